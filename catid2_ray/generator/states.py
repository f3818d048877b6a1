"""The token states of a frozen text encoder, computed once and read from local disk by every later epoch.

Ragged and float16: one row of E numbers per real token, equal texts stored once, texts in order of their length. For
Home Depot (54,667 titles and its training queries, 384 numbers) that is 0.8 GB; a step then costs no encoder at all.

N texts, U different texts, B batch, T tokens, E width of the text encoder.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from catid2_ray.errors import ArtifactError, InputError


class TokenStates(NamedTuple):
    """What a text encoder says of each token: `states_BTE` of any float type; `mask_BT` bool, real tokens first."""

    states_BTE: Tensor
    mask_BT: Tensor


def dense(states_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """float32 B×E: the mean over real tokens, length 1; equal to `catalog.text.HuggingFaceEncoder` on the same tokens."""
    mask_BT1 = mask_BT[..., None].float()
    return F.normalize((states_BTE.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1), dim=-1)


class StateCache:
    """Token states of N texts on local disk, memory-mapped; made by `build`.

    A folder holds `states.f16` (raw, tokens × E), `start.npy` (U + 1), `text.npy` (N, which different text a row is),
    `hash.npy` (U, of each text's ids) and `cache.json`, written last. Raises ArtifactError when the folder holds no complete cache.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        try:
            self.about = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
            self.start_U1 = np.load(folder / "start.npy", allow_pickle=False)
            self.text_N = np.load(folder / "text.npy", allow_pickle=False, mmap_mode="r")
            self.hash_U = np.load(folder / "hash.npy", allow_pickle=False)
            shape = (int(self.start_U1[-1]), int(self.about["width"]))
            self.states = np.memmap(folder / "states.f16", np.float16, "r", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"{folder} holds no complete cache of token states ({type(error).__name__}: {error}); build it again"
            ) from error

        self._by_hash_U = np.argsort(self.hash_U)

    def __len__(self) -> int:
        return len(self.text_N)

    @classmethod
    def build(
        cls,
        encoder,
        input_ids_NT: np.ndarray,
        folder: str | os.PathLike,
        *,
        batch: int = 128,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "StateCache":
        """Run `encoder` (`token_states(ids, mask)`, `pad`, `digest()`) over every different text and open the result.

        A complete cache of the same encoder and texts is opened as it is, an incomplete one is begun anew.
        `on_progress(done, all)` counts different texts. Raises InputError for padding that is not at the end, or a
        folder with the cache of another encoder or other texts.
        """
        folder, ids_NT = Path(folder), np.ascontiguousarray(input_ids_NT, np.int32)
        identity = {
            "encoder": encoder.digest(),
            "pad": encoder.pad,
            "texts": hashlib.sha256(ids_NT).hexdigest(),
            "rows": len(ids_NT),
        }
        if (folder / "cache.json").exists():
            cache = cls(folder)
            if {name: cache.about.get(name) for name in identity} != identity:
                raise InputError(
                    f"{folder} caches the states of another encoder or of other texts ({cache.about.get('rows')} rows, "
                    f"expected {len(ids_NT)}); give another folder, or delete that one"
                )
            return cache
        folder.mkdir(parents=True, exist_ok=True)
        ids_UT, text_N = np.unique(ids_NT, axis=0, return_inverse=True)
        length_U = _lengths(ids_UT, encoder.pad)
        order_U = np.argsort(length_U, kind="stable")
        place_U = np.empty_like(order_U)
        place_U[order_U] = np.arange(len(order_U))
        ids_UT, length_U = ids_UT[order_U], length_U[order_U]
        width = 0
        with open(folder / "states.f16", "wb") as out:
            for first in range(0, len(ids_UT), batch):
                length_B = length_U[first : first + batch]
                ids_BT = torch.from_numpy(ids_UT[first : first + batch, : max(1, length_B.max())]).long()
                mask_BT = torch.arange(ids_BT.shape[1]) < torch.from_numpy(length_B)[:, None]
                states_BTE = encoder.token_states(ids_BT.to(encoder.device), mask_BT.to(encoder.device)).cpu()
                width = states_BTE.shape[-1]
                out.write(states_BTE[mask_BT].to(torch.float16).numpy().tobytes())
                if on_progress is not None:
                    on_progress(min(first + batch, len(ids_UT)), len(ids_UT))
        hash_U = _hashes(ids_UT, encoder.pad)
        if len(np.unique(hash_U)) < len(hash_U):
            raise InputError("two different texts have one 64-bit hash, which chance does not explain; report it")
        np.save(folder / "hash.npy", hash_U)
        np.save(folder / "start.npy", np.concatenate(([0], np.cumsum(length_U))).astype(np.int64))
        np.save(folder / "text.npy", place_U[text_N.reshape(-1)].astype(np.int32))
        (folder / "cache.json.part").write_text(json.dumps({**identity, "width": width}), encoding="utf-8")
        os.replace(folder / "cache.json.part", folder / "cache.json")
        return cls(folder)

    def find(self, input_ids_BT: np.ndarray) -> np.ndarray:
        """int64 B: the number, for `take_texts`, of each text that is padded as the cache's texts were, to any length.

        Raises InputError for a text that the cache was not built from.
        """
        hash_B = _hashes(input_ids_BT, self.about["pad"])
        place_B = np.searchsorted(self.hash_U, hash_B, sorter=self._by_hash_U).clip(max=len(self.hash_U) - 1)
        text_B = self._by_hash_U[place_B]
        unknown_B = self.hash_U[text_B] != hash_B
        if unknown_B.any():
            raise InputError(
                f"row {int(unknown_B.argmax())} is a text that the cache of token states was not built from; build it from "
                "every text of the training"
            )
        return text_B

    def take(self, rows: np.ndarray, keep_BT: np.ndarray | None = None) -> TokenStates:
        """`take_texts` of the texts of rows 0 … N − 1."""
        return self.take_texts(self.text_N[rows], keep_BT)

    def take_texts(self, text_B: np.ndarray, keep_BT: np.ndarray | None = None) -> TokenStates:
        """float16 states of different texts 0 … U − 1, on CPU, cut to the longest; what stands at padding means nothing.

        `keep_BT`: bool over the token columns that the cache was built from; tokens left out are left out of the
        states, and the others move to the left. Raises InputError when it keeps padding.
        """
        start_B1 = self.start_U1[text_B][:, None]
        length_B = self.start_U1[np.asarray(text_B) + 1] - start_B1[:, 0]
        if keep_BT is None:
            kept_B, place_BT = length_B, np.arange(max(1, length_B.max(initial=1)))[None]
        else:
            kept_B = keep_BT.sum(1)
            if (keep_BT & (np.arange(keep_BT.shape[1]) >= length_B[:, None])).any():
                raise InputError("keep_BT keeps tokens that are padding; build it from the ids of the same rows")
            place_BT = np.argsort(~keep_BT, axis=1, kind="stable")[:, : max(1, kept_B.max(initial=1))]
        mask_BT = np.arange(place_BT.shape[1]) < kept_B[:, None]
        # Padding reads the text's first token, which is in the processor's cache already.
        index_BT = np.where(mask_BT, start_B1 + place_BT, np.minimum(start_B1, len(self.states) - 1))
        return TokenStates(torch.from_numpy(np.take(self.states, index_BT, axis=0)), torch.from_numpy(mask_BT))


def _hashes(ids_BT: np.ndarray, pad: int) -> np.ndarray:
    """uint64 B, of the real tokens and their places: a sum of each id times a number of its place, modulo 2^64."""
    factor_T = np.random.default_rng(0).integers(0, 2**63, ids_BT.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    return np.where(ids_BT == pad, 0, ids_BT.astype(np.int64) + 1).astype(np.uint64) @ factor_T


def _lengths(ids_UT: np.ndarray, pad: int) -> np.ndarray:
    real_UT = ids_UT != pad
    length_U = real_UT.sum(1)
    if (real_UT != (np.arange(ids_UT.shape[1]) < length_U[:, None])).any():
        raise InputError(
            f"texts must be padded at their end with {pad}; tokenize them with generator.vocabulary.tokenize"
        )
    return length_U
