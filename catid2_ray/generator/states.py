"""The token states of a frozen text encoder, computed once and read from local disk by every later epoch.

Ragged and float16: one row of E numbers per real token, equal texts stored once, texts in order of their length. For
Home Depot (54,667 titles and its training queries, 384 numbers) that is 0.8 GB; a step then costs no encoder at all.

Every pass of the encoder has the same number of texts, filled up where need be, of one of few lengths (multiples of 4): a text's
states are the same bit for bit whatever texts are encoded with it, so that a cache takes them from an earlier one.

N texts, U different texts, B batch, T tokens, E width of the text encoder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from catid2_ray.errors import ArtifactError, InputError

_LENGTHS = 4  # texts are padded to a multiple of this many tokens
_BATCH = 64  # texts of a pass of the encoder
_COPIED = 1024  # texts whose states are copied at a time


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
    `ids.npy` (tokens, their ids), `hash.npy` (U, of each text's ids) and `cache.json`, written last. Raises ArtifactError when the
    folder holds no complete cache.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        try:
            self.about = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
            self.start_U1 = np.load(folder / "start.npy", allow_pickle=False)
            self.text_N = np.load(folder / "text.npy", allow_pickle=False, mmap_mode="r")
            self.hash_U = np.load(folder / "hash.npy", allow_pickle=False)
            self.ids = np.load(folder / "ids.npy", allow_pickle=False, mmap_mode="r")
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
        batch: int = _BATCH,
        known: "StateCache | None" = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "StateCache":
        """Run `encoder` (`token_states(ids, mask)`, `pad`, `digest()`) over every different text and open the result.

        A complete cache of the same encoder and texts is opened as it is, an incomplete one is begun anew. States of texts that
        `known` has are copied from there, if it is of the same encoder, T and batch (`identity`). `on_progress(done, all)` counts
        different texts, first those that were copied. Raises InputError for padding that is not at the end, or a folder with the
        cache of another encoder or other texts.
        """
        folder, ids_NT = Path(folder), np.ascontiguousarray(input_ids_NT, np.int32)
        shared = cls.identity(encoder, tokens=ids_NT.shape[1], batch=batch)
        identity = {**shared, "texts": hashlib.sha256(ids_NT).hexdigest(), "rows": len(ids_NT)}
        if (folder / "cache.json").exists():
            cache = cls(folder)
            if {name: cache.about.get(name) for name in identity} != identity:
                raise InputError(
                    f"{folder} caches the states of another encoder or of other texts ({cache.about.get('rows')} rows, "
                    f"expected {len(ids_NT)}); give another folder, or delete that one"
                )
            return cache
        folder.mkdir(parents=True, exist_ok=True)
        texts, text_N = _distinct(ids_NT, encoder.pad)
        if known is not None and not known.matches(shared):
            known = None
        width = _write_states(encoder, texts, known, folder / "states.f16", batch=batch, on_progress=on_progress)
        np.save(folder / "hash.npy", texts.hash_U)
        np.save(folder / "ids.npy", texts.ids_UT[texts.ids_UT != encoder.pad])
        np.save(folder / "start.npy", texts.start_U1)
        np.save(folder / "text.npy", text_N)
        (folder / "cache.json.part").write_text(json.dumps({**identity, "width": width}), encoding="utf-8")
        os.replace(folder / "cache.json.part", folder / "cache.json")
        return cls(folder)

    @staticmethod
    def identity(encoder, *, tokens: int, batch: int = _BATCH) -> dict:
        """What a text's states depend on beside its ids."""
        return {"encoder": encoder.digest(), "pad": encoder.pad, "tokens": tokens, "batch": batch, "lengths": _LENGTHS}

    def matches(self, identity: dict) -> bool:
        return {name: self.about.get(name) for name in identity} == identity

    def known(self, texts: "_Texts") -> np.ndarray:
        """int64 U: the number here of each text, −1 for those that this cache does not have. Ids are compared, not hashes alone."""
        if not len(self.hash_U):
            return np.full(len(texts.hash_U), -1)
        place_U = np.searchsorted(self.hash_U, texts.hash_U, sorter=self._by_hash_U).clip(max=len(self.hash_U) - 1)
        text_U = self._by_hash_U[place_U]
        text_U[self.hash_U[text_U] != texts.hash_U] = -1
        text_U[np.diff(self.start_U1)[text_U] != texts.length_U] = -1
        for some in _blocks(np.flatnonzero(text_U >= 0), _COPIED):
            ids_B = texts.ids_UT[some]
            real_BT = np.arange(ids_B.shape[1]) < texts.length_U[some][:, None]
            equal_BT = np.zeros(ids_B.shape, bool)
            equal_BT[real_BT] = self.ids[self._tokens_of(text_U[some])] == ids_B[real_BT]
            text_U[some[(equal_BT != real_BT).any(1)]] = -1
        return text_U

    def _tokens_of(self, text_B: np.ndarray) -> np.ndarray:
        """The places of the tokens of these texts, one text after the other."""
        start_B, length_B = self.start_U1[text_B], self.start_U1[text_B + 1] - self.start_U1[text_B]
        place_T = np.arange(length_B.max(initial=0))
        return (start_B[:, None] + place_T)[place_T < length_B[:, None]]

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


class _Texts(NamedTuple):
    """Different texts in order of their length; text u's tokens are `start_U1[u]` … `start_U1[u + 1]` − 1 of all."""

    ids_UT: np.ndarray
    length_U: np.ndarray
    start_U1: np.ndarray
    hash_U: np.ndarray


def _distinct(ids_NT: np.ndarray, pad: int) -> tuple[_Texts, np.ndarray]:
    """The different texts, and int32 N: which of them a row is."""
    ids_UT, text_N = np.unique(ids_NT, axis=0, return_inverse=True)
    length_U = _lengths(ids_UT, pad)
    order_U = np.argsort(length_U, kind="stable")
    place_U = np.empty_like(order_U)
    place_U[order_U] = np.arange(len(order_U))
    ids_UT, length_U = ids_UT[order_U], length_U[order_U]
    hash_U = _hashes(ids_UT, pad)
    if len(np.unique(hash_U)) < len(hash_U):
        raise InputError("two different texts have one 64-bit hash, which chance does not explain; report it")
    start_U1 = np.concatenate(([0], np.cumsum(length_U))).astype(np.int64)
    return _Texts(ids_UT, length_U, start_U1, hash_U), place_U[text_N.reshape(-1)].astype(np.int32)


def _write_states(
    encoder, texts: _Texts, known: StateCache | None, file: Path, *, batch: int, on_progress: Callable[[int, int], None] | None
) -> int:  # fmt: skip
    """Write every text's states at its place; returns their width. Holds `_COPIED` texts or one pass at a time."""
    all_texts, width = len(texts.length_U), 0
    text_U = known.known(texts) if known is not None else np.full(all_texts, -1)
    done = int((text_U >= 0).sum())
    with open(file, "wb") as out:
        for some in _blocks(np.flatnonzero(text_U >= 0), _COPIED):
            states = np.take(known.states, known._tokens_of(text_U[some]), axis=0)
            width = _write_at(out, texts, some, states)
        if on_progress is not None and done:
            on_progress(done, all_texts)
        padded_U = np.minimum(-(-np.maximum(texts.length_U, 1) // _LENGTHS) * _LENGTHS, texts.ids_UT.shape[1])
        new = np.flatnonzero(text_U < 0)
        for length in np.unique(padded_U[new]):
            for some in _blocks(new[padded_U[new] == length], batch):
                width = _write_at(
                    out, texts, some, _encoded(encoder, texts, np.resize(some, batch), int(length), len(some))
                )
                done += len(some)
                if on_progress is not None:
                    on_progress(done, all_texts)
    return width


def _encoded(encoder, texts: _Texts, text_B: np.ndarray, length: int, real: int) -> np.ndarray:
    """float16 tokens × E of the first `real` of these texts, which are padded to `length`."""
    ids_BT = torch.from_numpy(texts.ids_UT[text_B, :length]).long()
    mask_BT = torch.arange(length) < torch.from_numpy(texts.length_U[text_B])[:, None]
    states_BTE = encoder.token_states(ids_BT.to(encoder.device), mask_BT.to(encoder.device)).cpu()
    return states_BTE[:real][mask_BT[:real]].to(torch.float16).numpy()


def _write_at(out: BinaryIO, texts: _Texts, text_B: np.ndarray, states: np.ndarray) -> int:
    """Write the states of these texts, which come one after the other, each at its place; returns the width."""
    width, first = states.shape[1], 0
    for run in np.split(text_B, np.flatnonzero(np.diff(text_B) != 1) + 1):
        start, end = texts.start_U1[run[0]], texts.start_U1[run[-1] + 1]
        out.seek(int(start) * width * states.itemsize)
        out.write(np.ascontiguousarray(states[first : first + end - start]).data)
        first += end - start
    return width


def _blocks(number_N: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (number_N[first : first + size] for first in range(0, len(number_N), size))


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
