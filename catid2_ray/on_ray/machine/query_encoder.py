"""What gives queries their vectors online: the encoder that made the products' vectors, as the release names it.

`lsa` lies in the release; a Hugging Face encoder is named, and is loaded on the replica. Where the generator reads the
query with that very encoder, its pass serves both and none is loaded.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder
from catid2_ray.quantizer.adapter import LinearAdapter
from catid2_ray.retrieval.folder import settings_of
from catid2_ray.retrieval.retriever import Retriever

BATCH = 32  # texts per forward pass


def open_retriever(folder, *, device: str = "cpu", **options) -> Retriever:
    """A retriever with its query encoder. `options`: as `retrieval.folder.opened` takes them."""
    settings = settings_of(folder)
    shared = settings.get("shared_encoder", False)
    encode = None if shared else query_encoder(folder, settings.get("encoder"), device=device)
    adapter = LinearAdapter.load(Path(folder) / "adapter") if (Path(folder) / "adapter").exists() else None
    return Retriever.open(folder, device=device, encode_query=encode, adapter=adapter, **options)


def query_encoder(folder, encoder: dict | None, *, device: str = "cpu") -> Callable[[list[str]], np.ndarray] | None:
    """Texts → float32 B×D of length 1; None where the release names no encoder. Raises EncoderError."""
    if encoder is None:
        return None
    if encoder["name"] == "lsa":
        return LsaEncoder.load(Path(folder) / "encoder").encode
    loaded = HuggingFaceEncoder(encoder["name"], batch=BATCH, tokens=encoder["tokens"], device=device)
    # A tokenizer of the Rust library may not be used from two threads at once.
    lock = threading.Lock()

    def encode(texts: list[str]) -> np.ndarray:
        with lock:
            return loaded.encode(texts)

    return encode
