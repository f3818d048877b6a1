"""The geometry of a semantic ID: L levels, K_l codes per level, its packed integer and its text `<a_65><b_225>…`.

Codes count from 0 inside each level. Packing is mixed-radix, first level most significant, so the order of packed
integers is the order of the IDs, and all IDs that share a prefix are neighbours.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from catid2_ray.errors import InputError, RecipeError

LEVEL_LETTERS = "abcdefghijklmnop"
_TOKEN = re.compile(r"<([a-p])_(\d{1,18})>")  # Python refuses to read a number of thousands of digits


@dataclass(frozen=True)
class DocidSpace:
    """All IDs of one quantizer.

    `codes_per_level`: K_1 … K_L. Raises RecipeError when there is no level, more than 16, a level without codes, or
    more than 2^63 − 1 IDs (they would not pack into an int64).
    """

    codes_per_level: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "codes_per_level", tuple(int(k) for k in self.codes_per_level))
        if not 1 <= len(self.codes_per_level) <= len(LEVEL_LETTERS):
            raise RecipeError(f"an ID has 1 to {len(LEVEL_LETTERS)} levels, not {len(self.codes_per_level)}")
        if min(self.codes_per_level) < 1:
            raise RecipeError(f"every level needs at least one code, found {self.codes_per_level}")
        if self.capacity > 2**63 - 1:
            raise RecipeError(
                f"codes_per_level {self.codes_per_level} spans {self.capacity} IDs, more than an int64 can hold (2^63 − 1)"
            )

    @property
    def levels(self) -> int:
        return len(self.codes_per_level)

    @cached_property
    def capacity(self) -> int:
        """Number of distinct IDs, ∏ K_l."""
        product = 1
        for k in self.codes_per_level:
            product *= k
        return product

    @cached_property
    def radix_L(self) -> np.ndarray:
        """int64, weight of each level in the packed integer."""
        return np.cumprod((1, *self.codes_per_level[:0:-1]), dtype=np.int64)[::-1].copy()

    def check(self, codes_NL: np.ndarray) -> np.ndarray:
        """Return `codes_NL` as an int64 array N×L, or raise InputError naming the first row outside 0 … K_l − 1."""
        codes_NL = np.asarray(codes_NL)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.levels or codes_NL.dtype.kind not in "iu":
            raise InputError(
                f"codes must be an integer array N×{self.levels}, found {codes_NL.dtype} of shape {codes_NL.shape}"
            )
        codes_NL = codes_NL.astype(np.int64, copy=False)
        outside_NL = (codes_NL < 0) | (codes_NL >= np.asarray(self.codes_per_level))
        if outside_NL.any():
            row, level = np.argwhere(outside_NL)[0]
            raise InputError(
                f"row {row}: code {codes_NL[row, level]} at level {level} is outside 0…{self.codes_per_level[level] - 1}"
            )
        return codes_NL

    def pack(self, codes_NL: np.ndarray) -> np.ndarray:
        """int64 N, one integer per ID, in the order of the IDs."""
        return self.check(codes_NL) @ self.radix_L

    def unpack(self, packed_N: np.ndarray) -> np.ndarray:
        """int64 N×L, the inverse of `pack`."""
        packed_N = np.asarray(packed_N, dtype=np.int64)
        return packed_N[:, None] // self.radix_L % np.asarray(self.codes_per_level)

    def prefix_of(self, packed_N: np.ndarray, length: int) -> np.ndarray:
        """int64 N, the first `length` codes of packed IDs as one integer."""
        return (
            packed_N if length == self.levels else packed_N // (self.radix_L[length - 1] if length else self.capacity)
        )

    def tokens(self) -> list[str]:
        """The ΣK token texts, level after level: `<a_0>` … `<a_{K_1−1}>`, `<b_0>` …"""
        return [f"<{LEVEL_LETTERS[level]}_{code}>" for level, k in enumerate(self.codes_per_level) for code in range(k)]

    def text(self, codes_L) -> str:
        """`<a_65><b_225><c_205><d_19>` for one ID (CAT-ID², section 3.4)."""
        return "".join(f"<{LEVEL_LETTERS[level]}_{int(code)}>" for level, code in enumerate(codes_L))

    def parse(self, text: str) -> tuple[int, ...]:
        """The inverse of `text`. Raises InputError for text that is no ID of this space."""
        found = _TOKEN.findall(text)
        codes = tuple(int(code) for _, code in found)
        if len(codes) != self.levels or self.text(codes) != text:
            raise InputError(f"{text!r} is not an ID of {self.levels} levels such as {self.text([0] * self.levels)!r}")
        self.check(np.asarray([codes]))
        return codes

    def parse_prefix(self, text: str) -> tuple[int, ...]:
        """The first 1 to L codes of an ID, such as `<a_65><b_225>`. Raises InputError for text that begins no ID."""
        codes = tuple(int(code) for _, code in _TOKEN.findall(text))
        if not 1 <= len(codes) <= self.levels or self.text(codes) != text:
            raise InputError(
                f"{text!r} does not begin an ID of {self.levels} levels such as {self.text([0] * self.levels)!r}"
            )
        self.check(np.asarray([codes + (0,) * (self.levels - len(codes))]))
        return codes
