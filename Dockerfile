# The image of every node: head, data, training, serving (cluster.yaml names it). Build it in the repository's root:
#   docker build -t REGISTRY/catid2-ray:0.1.0 .
#   docker build -t REGISTRY/catid2-ray:0.1.0-cpu --build-arg TORCH="--index-url https://download.pytorch.org/whl/cpu torch" .
# No engine was at hand where this was written: the install lines were run in a fresh environment of Python 3.11, the image was not built.
FROM python:3.11-slim-bookworm

# rsync is what Ray's cluster launcher copies files with; build tools and headers are for extensions that DeepSpeed may build.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git openssh-client rsync \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash catid2
WORKDIR /opt/catid2-ray

# torch alone first: it is the largest layer and changes least. From PyPI it is the CUDA build.
ARG TORCH=torch
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH}

COPY pyproject.toml README.md LICENSE ./
COPY catid2_ray ./catid2_ray
COPY jobs ./jobs
RUN pip install --no-cache-dir -c constraints.txt .

COPY serve_config.yaml ./
USER catid2
ENV OMP_NUM_THREADS=1 \
    TOKENIZERS_PARALLELISM=false \
    CATID2_CACHE=/tmp/catid2
CMD ["catid2", "--help"]
