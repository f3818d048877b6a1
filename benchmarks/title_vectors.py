"""Vectors of texts by a sentence encoder, kept in files from run to run: a real catalogue takes minutes of one core.

Texts go in blocks of BLOCK, each a .npy file named by the digest of the model and its texts, so that a run that was broken
off goes on where it stopped and another model or text is never mistaken for this one.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catid2_ray.catalog.text import HuggingFaceEncoder

BLOCK = 2048
TOKENS = 64  # the longest titles are cut; Home Depot's median is 15


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the model's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def text_vectors(encoder: HuggingFaceEncoder, texts: Sequence[str], *, model: str, cache: Path | None) -> np.ndarray:
    """float32 N×D, rows of length 1. `model`: its digest; `cache`: the folder of the blocks, or None to keep nothing."""
    vector_ND = np.empty((len(texts), encoder.width), np.float32)
    for start in range(0, len(texts), BLOCK):
        block = list(texts[start : start + BLOCK])
        path = None if cache is None else cache / f"{_digest(model, block)}.npy"
        if path is not None and path.exists():
            vector_ND[start : start + BLOCK] = np.load(path, allow_pickle=False)
            continue
        vector_ND[start : start + BLOCK] = part_ND = encoder.encode(block)
        if path is not None:
            cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                np.save(file, part_ND)
            partial.rename(path)
    return vector_ND


def _digest(model: str, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{model} {TOKENS} {len(texts)}".encode())
    for text in texts:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()[:32]
