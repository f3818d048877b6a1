"""Recall while training: a bounded, seeded sample of validation queries, and the constrained search that will be served.

The sample is taken part by part: of all queries seen so far those with the smallest draws are kept, so the driver never holds
more than them. Q queries, P relevant (query, product) pairs, K results, B batch, T tokens, L levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import default_cache, fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.vocabulary import tokenize
from catid2_ray.hashing import hash_of_text, uniform
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.stages.catalog import part_specs
from catid2_ray.retrieval.beam import BeamResult, constrained_beam_search
from catid2_ray.retrieval.trie import Trie

CUT = 50  # recall@50, which is also what `evaluation.min_beam_to_bm25` looks at; the beam is as wide
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What rank 0 needs to search: `input_ids_QT` of the sample, and of each relevant pair the query and the packed ID;
    `normalize` as the generator's loss asks for it.

    `trie` is opened where it is used, once a process.
    """

    store: Store
    ids: Manifest
    pad: int
    input_ids_QT: np.ndarray
    query_P: np.ndarray
    packed_P: np.ndarray
    normalize: str = "level"

    def figures(self, model, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
        """{"recall@50", "score"} of a generator, or of any Decoder: the mean over queries of the share that was found. `beat` is
        called again and again meanwhile."""
        trie = open_trie(self.store, self.ids)
        found_P = np.zeros(len(self.query_P))
        for start in range(0, len(self.input_ids_QT), _BATCH):
            ids_BT = self.input_ids_QT[start : start + _BATCH]
            mask_BT = ids_BT != self.pad
            used = int(mask_BT.any(0).sum())
            result = constrained_beam_search(
                model, trie, ids_BT[:, :used], mask_BT[:, :used], beam_width=CUT, top_k=CUT, normalize=self.normalize
            )  # fmt: skip
            here = np.flatnonzero((self.query_P >= start) & (self.query_P < start + _BATCH))
            beat()
            found_P[here] = found(result, trie.codes_per_level, self.query_P[here] - start, self.packed_P[here])
        recall = float(mean_recall(found_P, self.query_P))
        return {f"recall@{CUT}": recall, "score": recall}


def found(result: BeamResult, codes_per_level, query_P: np.ndarray, packed_P: np.ndarray) -> np.ndarray:
    """float P, 0 … 1: whether a pair's product is within the cut. An ID of g products takes g ranks; where the cut falls
    inside, each of them is inside with the chance of a random order."""
    docid_BKL, range_BK2 = result.docid_BKL.numpy(), result.row_range_BK2.numpy()
    real_BK = docid_BKL[..., 0] >= 0
    packed_BK = np.where(real_BK, np.maximum(docid_BKL, 0) @ DocidSpace(tuple(codes_per_level)).radix_L, -1)
    size_BK = range_BK2[..., 1] - range_BK2[..., 0]
    before_BK = np.cumsum(size_BK, axis=1) - size_BK
    inside_BK = np.clip(CUT - before_BK, 0, size_BK) / np.maximum(size_BK, 1)
    return ((packed_BK[query_P] == packed_P[:, None]) * inside_BK[query_P]).sum(1)


def mean_recall(found_P: np.ndarray, query_P: np.ndarray) -> float:
    """The share of each query's pairs that were found, averaged over the queries that have any."""
    wanted_Q, hit_Q = np.bincount(query_P), np.bincount(query_P, weights=found_P)
    return float((hit_Q[wanted_Q > 0] / wanted_Q[wanted_Q > 0]).mean())


_TRIES: dict[str, Trie] = {}


def open_trie(store: Store, ids: Manifest) -> Trie:
    """The trie of an artefact of IDs, once a process."""
    if ids.digest not in _TRIES:
        _TRIES[ids.digest] = Trie.open(fetch(store, ids, default_cache(), below=("trie/",)) / "trie")
    return _TRIES[ids.digest]


def keep_smallest(table: pa.Table, *, queries: int, seed: int) -> pa.Table:
    """The rows of those `queries` query_ids whose draws, a hash of seed and query_id, are the smallest."""
    ids, row_N = np.unique(table["query_id"].to_numpy().astype(object), return_inverse=True)
    if len(ids) <= queries:
        return table
    draw_I = uniform(hash_of_text(ids), seed, 6)
    kept_I = np.zeros(len(ids), bool)
    kept_I[np.argsort(draw_I, kind="stable")[:queries]] = True
    return table.filter(pa.array(kept_I[row_N]))


def sample(
    store: Store, catalog: Manifest, pairs: Manifest, ids: Manifest, tokenizer, *, queries: int, min_relevance: float,
    query_tokens: int, seed: int, normalize: str = "level",
) -> Validation:  # fmt: skip
    """Validation queries with a relevant product in the catalogue. InputError where there is none."""
    space, kept = DocidSpace(tuple(ids.metrics["codes_per_level"])), None
    for spec in part_specs(catalog, pairs):
        if not spec["pairs"]:
            continue
        judged = store.read_table(spec["pairs"], columns=["query_id", "query", "product_id", "split", "relevance"])
        judged = judged.filter((pc.field("split") == "validation") & (pc.field("relevance") >= min_relevance))
        ids_of_part = store.read_table(ids.file(spec["file"]), columns=["product_id", "codes"])
        place = pc.index_in(judged["product_id"].combine_chunks(), ids_of_part["product_id"].combine_chunks())
        packed = space.pack(matrix(ids_of_part["codes"])[place.drop_null().to_numpy()])
        known = judged.filter(place.is_valid()).select(["query_id", "query", "product_id"])
        known = known.append_column("packed", pa.array(packed)).group_by(known.column_names + ["packed"]).aggregate([])
        kept = known if kept is None else pa.concat_tables([kept, known])
        kept = keep_smallest(kept, queries=queries, seed=seed)
    if kept is None or not kept.num_rows:
        raise InputError(
            f"generator.validate_queries is {queries}, but no pair of split 'validation' with relevance ≥ {min_relevance} "
            "(evaluation.min_relevance) names a product of the catalogue: bring some, or set it to 0"
        )
    kept = kept.sort_by([("query_id", "ascending"), ("product_id", "ascending")])
    names, first, query_P = np.unique(
        kept["query_id"].to_numpy().astype(object), return_index=True, return_inverse=True
    )
    texts = kept["query"].take(pa.array(first)).to_pylist()
    return Validation(
        store=store, ids=replace(ids, recipe={}), pad=tokenizer.pad_token_id,
        input_ids_QT=tokenize(tokenizer, texts, length=query_tokens), query_P=query_P, packed_P=kept["packed"].to_numpy(),
        normalize=normalize,
    )  # fmt: skip
