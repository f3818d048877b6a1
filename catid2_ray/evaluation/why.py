"""Why a product is found for a query, or is not: its path through the search, and what its score is made of.

The release's own search tells: it is run once per level with room for every candidate, so that the place of the product's
prefix among them is known, and once per level for the product alone, which gives the prefix's score whether or not it was
kept. That costs about 2·L searches, however large the catalogue is.

B = 1 query, C candidates, L levels searched.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.filters import LiveFilter
from catid2_ray.retrieval.live_view import codes_of, result_rows
from catid2_ray.retrieval.rescoring import Hit, beam_hits
from catid2_ray.retrieval.retriever import MAX_K, Retriever


@dataclass(frozen=True)
class Step:
    """One level of the path. `candidates`: prefixes that continue a kept one; `rank`: the product's place among them, None
    where what it continues had fallen out before; `width`: how many are kept. `score`: what its prefix is chosen by, log P or,
    where the search looks ahead, S; `step` what this level adds to it, `best` and `last` that of the best candidate and of the
    last one kept. `of_all`: its place among all prefixes of the level, where that was asked for."""

    level: int
    token: str
    score: float
    step: float
    best: float
    last: float
    candidates: int
    width: int
    rank: int | None
    of_all: int | None = None

    @property
    def kept(self) -> bool:
        return self.rank is not None and self.rank <= self.width


@dataclass(frozen=True)
class Standing:
    """A product in the final order; `rank` None where it is not in it. `terms`: what each part adds to `score`."""

    who: str
    rank: int | None
    product_id: str
    title: str | None
    score: float
    terms: dict[str, float]


@dataclass(frozen=True)
class Why:
    """`verdict`: one sentence. `score_is`: what prefixes are chosen by. `fell_out`: the level at which the search lost the path,
    None where it kept it to its end. `standings`: the product, as if its path had been kept where it was not, the first and
    the k-th answer. `reached`: products that the search ranks, at most 1,000."""

    release: str
    query: str
    product_id: str
    title: str | None
    docid: str
    k: int
    score_is: str
    verdict: str
    fell_out: int | None
    reached: int
    steps: tuple[Step, ...]
    standings: tuple[Standing, ...]

    def figures(self) -> dict:
        """Ready for JSON."""
        return asdict(self)


def why(retriever: Retriever, query: str, product_id: str, *, k: int = 10, exact: bool = False) -> Why:
    """What the release's search does with this product. `exact`: also its place among all IDs, which scores the whole trie
    (`exact.decoder_rows` decoder rows). Raises QueryError for a query or k that cannot be answered, InputError for a product
    that neither the release nor a change to it has."""
    retriever.check(query, k=k)
    view, row = retriever.live.view, retriever.live.row(product_id)
    codes_L = codes_of(view, [row])[0]
    about = {
        "release": retriever.release, "query": query, "product_id": product_id, "title": retriever.products.title(row),
        "docid": retriever.space.text(codes_L), "k": k,
        "score_is": "log P of the prefix" if retriever.lookahead is None else "S of the prefix, which looks ahead",
    }  # fmt: skip
    if not view.is_live([row])[0]:
        verdict = "Not found: it was withdrawn from the release since, so that no search finds it."
        return Why(**about, verdict=verdict, fell_out=None, reached=0, steps=(), standings=())
    alone = np.zeros(view.rows, bool)
    alone[row] = True
    own = LiveFilter.of(alone, view.base.rows)
    widths = retriever.widths_for(k)
    steps = _steps(retriever, query, codes_L, own, widths)
    if exact:
        steps = _placed(retriever, query, codes_L, steps)
    fell_out = next((step.level for step in steps if not step.kept), None)
    found = retriever.searched([query], widths=widths, top_k=widths[-1])
    hits = _hits(retriever, found, query, bounded=True)
    rank = next((place for place, hit in enumerate(hits, 1) if hit.product_id == product_id), None)
    with_own = found if fell_out is None else _joined(found, _alone(retriever, query, own, retriever.levels))
    mine = next(hit for hit in _hits(retriever, with_own, query, bounded=False) if hit.product_id == product_id)
    standings = [_standing(retriever, "this product", rank, mine)]
    standings += [
        _standing(retriever, f"answer {place}", place, hits[place - 1]) for place in sorted({1, min(k, len(hits))})
    ]
    verdict = _verdict(retriever, steps, standings, fell_out, k)
    return Why(**about, verdict=verdict, fell_out=fell_out, reached=len(hits), steps=steps, standings=tuple(standings))


def _steps(
    retriever: Retriever, query: str, codes_L: np.ndarray, own: LiveFilter, widths: list[int]
) -> tuple[Step, ...]:
    codes_per_level, rows = retriever.trie.codes_per_level, retriever.live.view.rows
    steps, kept, before = [], 1, 0.0
    tokens = [f"{part}>" for part in retriever.space.text(codes_L).split(">")[:-1]]
    for level, width in enumerate(widths, 1):
        most = min(kept * codes_per_level[level - 1], rows)
        result = retriever.searched([query], widths=[*widths[: level - 1], most], levels=level, top_k=most)
        count = int(result.count_B[0])
        score_C = _scores(result)[:count].tolist()
        same_C = (result.docid_BKL[0, :count].numpy() == codes_L[:level]).all(1)
        score = float(_scores(_alone(retriever, query, own, level))[0])
        kept = min(width, count)
        steps.append(
            Step(
                level, tokens[level - 1], score, score - before, score_C[0], score_C[kept - 1], count, width,
                int(same_C.argmax()) + 1 if same_C.any() else None,
            )
        )  # fmt: skip
        before = score
    return tuple(steps)


def _alone(retriever: Retriever, query: str, own: LiveFilter, levels: int) -> BeamResult:
    return retriever.searched([query], widths=[1] * levels, levels=levels, top_k=1, allowed=own, scored_as=[None])


def _scores(result: BeamResult) -> torch.Tensor:
    """What the results of the one query are ordered by."""
    return (result.logp_BK if result.score_BK is None else result.score_BK)[0]


def _placed(retriever: Retriever, query: str, codes_L: np.ndarray, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """With `of_all`, but for levels at which a product inserted since has a prefix of its own."""
    node_L = retriever.trie.nodes_of(codes_L[None])[0]
    placed = []
    for step, node, score_Bn in zip(steps, node_L.tolist(), retriever.exact([query]).score_L):
        score_n = score_Bn[0]
        before = (score_n > score_n[node]).sum() + (score_n[:node] == score_n[node]).sum()
        placed.append(step if node < 0 else replace(step, of_all=int(before) + 1))
    return tuple(placed)


def _hits(retriever: Retriever, result: BeamResult, query: str, *, bounded: bool) -> list[Hit]:
    """The products of a result in their final order, the first MAX_K as released, or all of them."""
    view, expansion = retriever.live.view, retriever.expansion
    k = MAX_K if bounded else len(result_rows(result, view)[0].row_M)
    if expansion is None:
        return beam_hits(result, view, retriever.products, k=k, allowed=None)[0]
    if not bounded:
        expansion = replace(expansion, quota=None, most=None)
    return retriever.rescored(result, [query], k=k, expansion=expansion, trie=view)[0]


def _joined(found: BeamResult, own: BeamResult) -> BeamResult:
    """The results of a search and one more, in one."""
    count = int(found.count_B[0])
    columns = {
        name: torch.cat((mine[:, :count], more[:, :1]), 1)
        for name, mine, more in zip(found._fields, found, own)
        if mine is not None and name != "count_B"
    }
    return BeamResult(**columns, count_B=torch.tensor([count + 1]))


def _standing(retriever: Retriever, who: str, rank: int | None, hit: Hit) -> Standing:
    expansion = retriever.expansion
    terms = {} if expansion is None else expansion.terms(hit)
    return Standing(who, rank, hit.product_id, hit.title, hit.score, terms)


def _verdict(retriever: Retriever, steps, standings: list[Standing], fell_out: int | None, k: int) -> str:
    mine, last = standings[0], standings[-1]
    if fell_out is not None:
        step = steps[fell_out - 1]
        return (
            f"Not found: the search lost its path at level {fell_out}, where its prefix ranked {step.rank:,} of "
            f"{step.candidates:,} and {step.width:,} are kept."
        )
    if mine.rank is None:
        return (
            "Not found: its path was kept, but it is not among the products that are ranked (serving.expansion.most and quota, at "
            f"most {MAX_K:,})."
        )
    if mine.rank <= k:
        return f"Found: it is answer {mine.rank:,}."
    lacks = {name: last.terms[name] - part for name, part in mine.terms.items()}
    most = max(lacks, key=lacks.get, default=None)
    behind = f"; it loses most by its {most} score" if most else ""
    return f"Reached, but ranked {mine.rank:,}, below the first {k}{behind}."
