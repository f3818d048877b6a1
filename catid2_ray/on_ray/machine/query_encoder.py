"""What gives queries their vectors online: the encoder that made the products' vectors, as the release names it.

`lsa` and a tuned encoder lie in the release; another Hugging Face encoder is named, and is loaded on the replica. Where the
generator reads the query with that very encoder, its pass serves both and none is loaded.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import TUNED, default_cache, fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder
from catid2_ray.quantizer.adapter import LinearAdapter
from catid2_ray.retrieval.folder import settings_of
from catid2_ray.retrieval.retriever import Retriever

BATCH = 32  # texts per forward pass


def stored_encoder(
    store: Store, encoder: dict, *, embeddings: Manifest, tuned: Manifest | None
) -> Callable[[list[str]], np.ndarray]:
    """`query_encoder` of artefacts in a store, where no serving folder is laid out. `encoder`: name and tokens; `tuned`: as of
    `artifacts.release.tuned`."""
    folder = None
    if encoder["name"] == "lsa":
        folder = fetch(store, embeddings, default_cache(), below=("encoder/",))
    elif tuned is not None:
        folder, encoder = fetch(store, tuned, default_cache()), {**encoder, "tuned": tuned.digest}
    return query_encoder(folder, encoder)


def tuned_folder(store: Store, tuned: Manifest) -> str:
    """A local folder from which the tuned encoder loads as any Hugging Face model does."""
    return str(fetch(store, tuned, default_cache()) / TUNED)


def open_retriever(folder, *, device: str = "cpu", **options) -> Retriever:
    """A retriever with its query encoder. `options`: as `retrieval.folder.opened` takes them."""
    settings = settings_of(folder)
    shared = settings.get("shared_encoder", False)
    encode = None if shared else query_encoder(folder, settings.get("encoder"), device=device)
    adapter = LinearAdapter.load(Path(folder) / "adapter") if (Path(folder) / "adapter").exists() else None
    return Retriever.open(folder, device=device, encode_query=encode, adapter=adapter, **options)


def query_encoder(folder, encoder: dict | None, *, device: str = "cpu") -> Callable[[list[str]], np.ndarray] | None:
    """Texts → float32 B×D of length 1; None where the release names no encoder. Raises EncoderError.

    `encoder`: name, tokens, and `tuned`, a digest, where its weights lie in the folder."""
    if encoder is None:
        return None
    if encoder["name"] == "lsa":
        return LsaEncoder.load(Path(folder) / "encoder").encode
    name = Path(folder) / TUNED if encoder.get("tuned") else encoder["name"]
    loaded = HuggingFaceEncoder(name, batch=BATCH, tokens=encoder["tokens"], device=device)
    # A tokenizer of the Rust library may not be used from two threads at once.
    lock = threading.Lock()

    def encode(texts: list[str]) -> np.ndarray:
        with lock:
            return loaded.encode(texts)

    return encode
