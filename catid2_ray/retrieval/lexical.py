"""BM25 of candidates: each product's words with their weights, memory-mapped in trie-row order, summed for a query's words.

The formula and the words are those of the baseline `evaluation/baselines/bm25.py` (Lucene's form), but laid out by
product, since only candidates are scored: a query reads the words of its candidates, not the postings of the catalogue.

N rows (products), V terms of the vocabulary, P (product, term) pairs, B queries, C candidates of one query.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.retrieval.arrays import entries, read_header
from catid2_ray.scripts import RULES, STOPWORDS, words_of

FORMAT = 1
HEADER = "lexical.json"
K1, B = 1.2, 0.75  # as in CHAP's baseline (Pyserini's names for them)
_AGAIN = "Make the serving part again"
_MANY = 500  # words from which on one pass over the vocabulary is cheaper than a binary search for each


def words(text: str, *, indexed: bool = False, rules: int = RULES) -> list[str]:
    """The words of `scripts.words_of` without English stop words; no stemming."""
    return [word for word in words_of(text, indexed=indexed, rules=rules) if word not in STOPWORDS]


class Counted(NamedTuple):
    """The distinct words of some texts, one text after the other: `count_N` distinct words of each, `length_N` all
    words of each, `words` and `times` (int32) of P pairs."""

    count_N: np.ndarray
    length_N: np.ndarray
    words: pa.Array
    times: np.ndarray


def count_words(texts: Sequence[str], *, rules: int = RULES) -> Counted:
    """What `LexicalIndex.write` needs to know of texts; words ascend inside a text."""
    counters = [Counter(words(text, indexed=True, rules=rules)) for text in texts]
    ordered = [sorted(counter) for counter in counters]
    times = [counter[word] for counter, names in zip(counters, ordered) for word in names]
    return Counted(
        np.array([len(names) for names in ordered], np.int32),
        np.array([sum(counter.values()) for counter in counters], np.int32),
        pa.array([word for names in ordered for word in names], pa.string()),
        np.array(times, np.int32),
    )


class Block(NamedTuple):
    """Some rows in trie order: `count_N` terms and `length_N` words of each, then `term_P` (numbers of the vocabulary)
    and `times_P` of them all."""

    count_N: np.ndarray
    length_N: np.ndarray
    term_P: np.ndarray
    times_P: np.ndarray


@dataclass(frozen=True, eq=False)
class LexicalIndex:
    """`start_N1` int64: row i has entries start[i] … start[i+1] − 1 of `term_P` (int32, ascending in a row) and
    `weight_P` (float32, its share of a score). `vocabulary`: V words, ascending; `idf_V` float32; `mean_length`: words per
    row when the index was made; `rules`: those of `scripts.words_of` by which its words were cut."""

    start_N1: np.ndarray
    term_P: np.ndarray
    weight_P: np.ndarray
    vocabulary: pa.Array
    idf_V: np.ndarray
    mean_length: float
    rules: int = RULES

    @property
    def rows(self) -> int:
        return len(self.start_N1) - 1

    @classmethod
    def write(
        cls, folder, blocks: Iterable[Block], *, vocabulary: pa.Array, frequency_V, rows: int, mean_length: float
    ):
        """Write the rows of `blocks`, in trie order, and open what was written.

        `vocabulary`: all words, ascending; `frequency_V`: in how many rows each occurs; `rows`: N; `mean_length`: words
        per row. Memory: one block, N starts and the vocabulary. The header is written last. Raises InputError where the
        blocks do not have N rows.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        frequency_V = np.asarray(frequency_V, np.float64)
        idf_V = np.log1p((rows - frequency_V + 0.5) / (frequency_V + 0.5))
        counts = []
        with (folder / "term.bin").open("wb") as terms, (folder / "weight.bin").open("wb") as weights:
            for block in blocks:
                counts.append(block.count_N.astype(np.int64))
                weight_P = _weights(block, idf_V, mean_length)
                terms.write(np.ascontiguousarray(block.term_P, np.int32))
                weights.write(np.ascontiguousarray(weight_P, np.float32))
        start_N1 = np.concatenate(([0], np.cumsum(np.concatenate(counts or [np.empty(0, np.int64)]))))
        if len(start_N1) != rows + 1:
            raise InputError(f"a lexical index of {rows} rows was given {len(start_N1) - 1}; pass every row once")
        np.save(folder / "start.npy", start_N1.astype(np.int64), allow_pickle=False)
        np.save(folder / "idf.npy", idf_V.astype(np.float32), allow_pickle=False)
        table = pa.table({"word": vocabulary})
        with pa.ipc.new_file(str(folder / "vocabulary.arrow"), table.schema) as writer:
            writer.write_table(table)
        header = {"format": FORMAT, "rows": rows, "pairs": int(start_N1[-1]), "words": len(vocabulary)}
        header |= {"mean_length": float(mean_length), "rules": RULES}
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder) -> "LexicalIndex":
        """Memory-map a written index. Raises ArtifactError for a folder that is missing, half-written or inconsistent."""
        folder = Path(folder)
        try:
            header = read_header(folder / HEADER, "lexical index", version=FORMAT, again=_AGAIN)
            start_N1, idf_V = (
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
                for name in ("start", "idf")
            )
            mean_length, rules = header["mean_length"], header.get("rules", 1)
            term_P, weight_P = (_mapped(folder / f"{name}.bin", kind) for name, kind in _FILES)
            words_ = (
                pa.ipc.open_file(pa.memory_map(str(folder / "vocabulary.arrow"))).read_all()["word"].combine_chunks()
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{folder} holds no lexical index ({type(error).__name__}: {error}). {_AGAIN}"
            ) from None
        sizes = (len(start_N1) - 1, len(term_P), len(weight_P), len(words_), len(idf_V))
        expected = tuple(header[name] for name in ("rows", "pairs", "pairs", "words", "words"))
        if sizes != expected or start_N1[-1] != len(term_P):
            raise ArtifactError(f"{folder}: its arrays have {sizes} entries, its header says {header}. {_AGAIN}")
        return cls(start_N1, term_P, weight_P, words_, idf_V, mean_length, rules)

    def more(self, texts: Sequence[str]) -> "LexicalIndex":
        """An index of other texts (rows 0, 1, …) with this one's vocabulary and weights; words that it lacks count
        towards the length alone."""
        counted = count_words(texts, rules=self.rules)
        encoded = counted.words.dictionary_encode()
        if len(encoded.dictionary) < _MANY:
            places = [self._place(word) for word in encoded.dictionary.to_pylist()]
        else:
            places = pc.index_in(encoded.dictionary, self.vocabulary).to_pylist()
        term_U = np.array([-1 if place is None else place for place in places], np.int32)
        term_P = term_U[encoded.indices.to_numpy()]
        row_P, known_P = np.repeat(np.arange(len(texts)), counted.count_N), term_P >= 0
        count_N = np.bincount(row_P[known_P], minlength=len(texts))
        block = Block(count_N, counted.length_N, term_P[known_P], counted.times[known_P])
        weight_P = _weights(block, self.idf_V, self.mean_length).astype(np.float32)
        start_N1 = np.concatenate(([0], np.cumsum(count_N))).astype(np.int64)
        return LexicalIndex(start_N1, block.term_P, weight_P, self.vocabulary, self.idf_V, self.mean_length, self.rules)

    def scores(self, queries: Sequence[str], row_BC) -> np.ndarray:
        """float32 B×C, the BM25 of each candidate for its query: 0 where no word is shared, and for row −1.

        `row_BC`: integers, trie rows, −1 beyond a query's candidates. A word that a query has twice counts twice.
        Raises InputError for rows outside −1 … N−1.
        """
        row_BC = np.asarray(row_BC)
        if row_BC.ndim != 2 or len(row_BC) != len(queries) or row_BC.dtype.kind not in "iu":
            raise InputError(
                f"row_BC must be whole numbers, one row of them per query, found {row_BC.dtype} {row_BC.shape}"
            )
        if row_BC.size and not -1 <= row_BC.min() <= row_BC.max() < self.rows:
            raise InputError(
                f"rows must be −1…{self.rows - 1}, found {row_BC.min()} to {row_BC.max()}; take index and trie from one release"
            )
        score_BC = np.zeros(row_BC.shape, np.float32)
        for b, query in enumerate(queries):
            terms, times = self.terms(query)
            real_C = np.flatnonzero(row_BC[b] >= 0)
            if len(terms) and len(real_C):
                score_BC[b, real_C] = self.of_rows(terms, times, row_BC[b, real_C])
        return score_BC

    def everywhere(self, queries: Sequence[str]) -> np.ndarray:
        """float32 B×N, the BM25 of every row for each query. The first call turns the index over, to rows by term: 8 bytes a
        pair in memory; then a query reads the postings of its words alone."""
        score_BN = np.zeros((len(queries), self.rows), np.float32)
        for score_N, query in zip(score_BN, queries):
            self.add_everywhere(score_N, *self.terms(query))
        return score_BN

    def add_everywhere(self, score_N: np.ndarray, terms: np.ndarray, times: np.ndarray) -> None:
        """Add the BM25 of every row for one query, as `terms` gives it, to float32 N."""
        start_U1, row_P, weight_P = self.postings.start_U1, self.postings.row_P, self.postings.weight_P
        # Words in ascending order, as `scores` adds them up.
        for at, number in zip(*self.postings.places(terms, times)):
            first, end = start_U1[at : at + 2]
            score_N[row_P[first:end]] += weight_P[first:end] * number

    @cached_property
    def postings(self) -> "_Postings":
        by_term_P = np.argsort(self.term_P, kind="stable")
        row_P = np.repeat(np.arange(self.rows, dtype=np.int32), np.diff(self.start_N1))[by_term_P]
        term_U, start_U = np.unique(self.term_P[by_term_P], return_index=True)
        return _Postings(term_U, np.append(start_U, len(row_P)), row_P, self.weight_P[by_term_P])

    def of_rows(self, terms: np.ndarray, times: np.ndarray, row_M: np.ndarray) -> np.ndarray:
        """float32 M, the BM25 of some rows for one query, as `terms` gives it (at least one)."""
        first_M = self.start_N1[row_M]
        entry_P, owner_P = entries(first_M, self.start_N1[row_M + 1] - first_M)
        term_P = self.term_P[entry_P]
        at_P = np.minimum(np.searchsorted(terms, term_P), len(terms) - 1)
        hit_P = np.flatnonzero(terms[at_P] == term_P)
        weight_P = self.weight_P[entry_P[hit_P]] * times[at_P[hit_P]]
        return np.bincount(owner_P[hit_P], weight_P, len(row_M)).astype(np.float32)

    def terms(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the query's known words, ascending, and how often it has each (float32)."""
        counted = Counter(words(query, rules=self.rules))
        times_of = {self._place(word): times for word, times in counted.items()}
        times_of.pop(None, None)
        terms = np.array(sorted(times_of), np.int32)
        return terms, np.array([times_of[term] for term in terms.tolist()], np.float32)

    def _place(self, word: str) -> int | None:
        # Arrow sorts by the bytes of UTF-8, as Python does by code points: the same order.
        place = bisect_left(range(len(self.vocabulary)), word, key=lambda at: self.vocabulary[at].as_py())
        return place if place < len(self.vocabulary) and self.vocabulary[place].as_py() == word else None


class _Postings(NamedTuple):
    """The U terms that occur, ascending; term `term_U[u]` stands in rows `row_P[start_U1[u]]` … with weights
    `weight_P[start_U1[u]]` …"""

    term_U: np.ndarray
    start_U1: np.ndarray
    row_P: np.ndarray
    weight_P: np.ndarray

    def places(self, terms: np.ndarray, times: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Which of the U terms these are, and their `times`; terms that do not occur are left out."""
        if not len(self.term_U):
            return [], times[:0]
        at = np.minimum(np.searchsorted(self.term_U, terms), len(self.term_U) - 1)
        known = self.term_U[at] == terms
        return at[known].tolist(), times[known]


@dataclass(frozen=True, eq=False)
class GrownWords:
    """The words of a release, and those of products inserted since: rows N … N + D − 1. Immutable.

    Inserted rows lie in segments that merge when the last outgrow half of the one before, so that each row is copied
    O(log D) times in all. Scores are those of one index, to the last bit.
    """

    base: LexicalIndex
    segments: tuple[LexicalIndex, ...] = ()

    @property
    def rows(self) -> int:
        return self.base.rows + sum(segment.rows for segment in self.segments)

    def with_texts(self, texts: Sequence[str]) -> "GrownWords":
        """With the words of more products."""
        last = self.base.more(texts)
        kept, size = len(self.segments), last.rows
        while kept and self.segments[kept - 1].rows < 2 * size:
            kept -= 1
            size += self.segments[kept].rows
        last = _joined((*self.segments[kept:], last))
        last.postings  # noqa: B018 (now, so that no query waits for it)
        return GrownWords(self.base, (*self.segments[:kept], last))

    def scores(self, queries: Sequence[str], row_BC) -> np.ndarray:
        """As `LexicalIndex.scores`, over all rows."""
        row_BC, first = np.asarray(row_BC), self.base.rows
        score_BC = self.base.scores(queries, np.where(row_BC >= first, -1, row_BC))
        if row_BC.size and row_BC.max() >= self.rows:
            raise InputError(
                f"rows must be −1…{self.rows - 1}, found {row_BC.max()}; take index and trie from one release"
            )
        asked_B = [self.base.terms(query) if (row_C >= first).any() else None for query, row_C in zip(queries, row_BC)]
        for segment in self.segments:
            mine_BC = (row_BC >= first) & (row_BC < first + segment.rows)
            for b in np.flatnonzero(mine_BC.any(1)).tolist():
                if len(asked_B[b][0]):
                    score_BC[b, mine_BC[b]] = segment.of_rows(*asked_B[b], row_BC[b, mine_BC[b]] - first)
            first += segment.rows
        return score_BC

    def everywhere(self, queries: Sequence[str]) -> np.ndarray:
        """float32 B×(N + D), as `LexicalIndex.everywhere`."""
        score_BN = np.zeros((len(queries), self.rows), np.float32)
        for score_N, query in zip(score_BN, queries):
            asked, first = self.base.terms(query), 0
            for part in (self.base, *self.segments):
                part.add_everywhere(score_N[first : first + part.rows], *asked)
                first += part.rows
        return score_BN


def _joined(parts: Sequence[LexicalIndex]) -> LexicalIndex:
    """The rows of all, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    count_N = np.concatenate([np.diff(part.start_N1) for part in parts])
    return replace(
        parts[0], start_N1=np.concatenate(([0], np.cumsum(count_N))),
        term_P=np.concatenate([part.term_P for part in parts]), weight_P=np.concatenate([part.weight_P for part in parts]),
    )  # fmt: skip


def _weights(block: Block, idf_V: np.ndarray, mean_length: float) -> np.ndarray:
    length_P = np.repeat(block.length_N, block.count_N)
    damping_P = K1 * (1 - B + B * length_P / mean_length) if mean_length else np.ones(len(length_P))
    return idf_V[block.term_P] * (block.times_P / (damping_P + block.times_P))


_FILES = (("term", np.int32), ("weight", np.float32))


def _mapped(path: Path, kind) -> np.ndarray:
    """An empty file cannot be mapped."""
    return np.asarray(np.memmap(path, kind, mode="r")) if path.stat().st_size else np.empty(0, kind)
