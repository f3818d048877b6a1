"""Between serving and evaluation: the weights of what is served, fitted to the validation queries.

Two things are decided, by recall on those queries: with which weight log P chooses beams (of those that the recipe gives to
try), and with which weights the products of the beams are ranked (`retrieval/mixture.py`), cross-fitted. What the recipe states
stays where that finds as much, and where there are too few queries. The serving part is not touched: weights are a small part of
the release of their own, so that another generator lays no vectors out anew.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import default_cache, parts_folder, retriever_settings
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.evaluation.metrics import bootstrap_means, recalls
from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.stages import evaluate
from catid2_ray.retrieval.mixture import Judged, cross_fitted, fitted

KS = (10, 50, 100)
FEWEST, MOST, CANDIDATES = 50, 2000, 200  # queries, queries, products of each
_QUERIES_PER_SPEC = 64


def run(job: Job, parts: dict[str, Manifest]) -> Manifest | None:
    """The mixture artefact: mixture.json; None where the recipe states all weights. An append without pairs keeps that of the
    release before, if it is of the same settings."""
    serving = job.recipe.serving
    tried = list(serving.tried) if "node_vectors" in parts else []
    if not (serving.fits_weights or tried):
        return None
    settings = {
        "fit": serving.fits_weights, "try": tried, "min_relevance": job.recipe.evaluation.min_relevance,
        "candidates": CANDIDATES, "ks": list(KS), "queries": MOST, "seed": job.recipe.seed,
    }  # fmt: skip
    if not parts["pairs"].metrics["pairs_table"]:
        return _of_before(job, parts, settings)
    parents = STAGES["mixture"].reads(parts)
    return job.produce("mixture", settings, parents, lambda attempt: _make(job, attempt, parts))


def _of_before(job: Job, parts: dict[str, Manifest], settings: dict) -> Manifest | None:
    before = job.previous.parts.get("mixture") if job.previous else None
    same = before is not None and before.asked == settings
    if same and before.parents["generator"] == parts["generator"].digest:
        return before
    progress.event("weights_as_stated", reason="'the catalogue has no pairs'")
    return None


def _make(job: Job, attempt: Attempt, parts: dict[str, Manifest]) -> Manifest:
    settings = attempt.settings
    judged = _judged(job, parts)
    if isinstance(judged, str):
        figures = {"adopted": False, "reason": judged}
    else:
        served = retriever_settings(parts, release="candidate")
        weights = [served["lookahead"]["logp_weight"], *settings["try"]] if settings["try"] else [None]
        found = _found(job, parts, judged, list(dict.fromkeys(weights)))
        figures = decided(judged, found, fit=settings["fit"])
    progress.event("mixture", adopted=figures["adopted"], **{k: repr(v) for k, v in figures.items() if k == "reason"})
    entry = job.store.write_file(attempt.name("mixture.json"), json.dumps(figures, indent=1).encode())
    return attempt.commit([entry], metrics=figures)


def _judged(job: Job, parts: dict[str, Manifest]) -> Judgements | str:
    """The validation queries, a seeded sample of them where they are many, or why they cannot decide anything."""
    judged = evaluate.judged_validation(job, parts)
    if isinstance(judged, str):
        return judged
    if len(judged.queries) < FEWEST:
        return (
            f"{len(judged.queries)} {evaluate.VALIDATION} queries have a relevant product, at least {FEWEST} are needed"
        )
    return evaluate.sampled(judged, MOST, seed=job.recipe.seed)


class Found(NamedTuple):
    """What one search found: per query M product ids, best first, and their features M×F, one per term of `stated`."""

    logp_weight: float | None
    stated: dict[str, float]
    product_ids: list[list[str]]
    features_MF: list[np.ndarray]


def _found(
    job: Job, parts: dict[str, Manifest], judged: Judgements, logp_weights: Sequence[float | None]
) -> list[Found]:
    specs = [
        {"logp_weight": weight, **one} for weight in logp_weights for one in evaluate.sliced(judged, _QUERIES_PER_SPEC)
    ]
    results = map_parts(
        _Candidates, {"store": job.store, "parts": parts}, specs, workers=job.recipe.evaluation.workers,
        label="scoring candidates of validation queries", unit="queries", actors=True,
    )  # fmt: skip
    found = {weight: Found(weight, results[0]["stated"], [], []) for weight in logp_weights}
    for spec, result in zip(specs, results):
        found[spec["logp_weight"]].product_ids.extend(result["product_ids"])
        found[spec["logp_weight"]].features_MF.extend(
            np.array(one, float).reshape(len(one), len(result["stated"])) for one in result["features"]
        )
    return list(found.values())


class _Candidates:
    """A retriever over the candidate release with the weights that the recipe states, but for that of log P."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest]):
        settings = retriever_settings(parts, release="candidate")
        self.retriever = open_retriever(parts_folder(store, parts, default_cache(), settings))

    def __call__(self, spec: dict) -> dict:
        retriever = self.retriever
        if spec["logp_weight"] is not None:
            retriever.lookahead = replace(retriever.lookahead, logp_weight=spec["logp_weight"])
        texts = [query[: retriever.max_query_chars] for query in spec["queries"]]
        hits = retriever.retrieve(texts, k=min(CANDIDATES, retriever.beam_width))
        expansion = retriever.expansion
        return {
            "position": spec["position"],
            "stated": {} if expansion is None else expansion.weights,
            "product_ids": [[hit.product_id for hit in one] for one in hits],
            "features": [[[] if expansion is None else expansion.features(hit) for hit in one] for one in hits],
        }


def decided(judgements: Judgements, found: Sequence[Found], *, fit: bool) -> dict:
    """Figures of the decision, ready for JSON: `adopted`, whether anything differs from what is stated; `reason` where not;
    `lookahead` and `expansion`, the settings to serve with in place of the stated ones; `score`, the formula as a person reads it;
    `queries`; `recall` and `gain` (mean and ends of the paired 95 % interval) over the first search as stated, by k; `tried`:
    recall of each weight of log P. Fitted weights are judged cross-fitted.

    `found`: searches of the same queries, the one that the recipe states first. Another one must find more beyond chance: the
    interval of its gain, of the mean over k, lies above 0. The best of several ties would be chosen by luck alone.
    """
    base_QK = _recall(judgements, found[0].product_ids)
    ways = [_ways(judgements, search, fit=fit) for search in found]
    best = [
        max(of_search, key=lambda way: way[1].mean()) for of_search in ways
    ]  # of equals the stated weights, which are first
    chosen, (_, first_QK) = 0, best[0]
    for at, (_, recall_QK) in enumerate(best[1:], 1):
        [gain] = bootstrap_means((recall_QK - first_QK).mean(1, keepdims=True))
        if gain.low > 0 and recall_QK.mean() > best[chosen][1].mean():
            chosen = at
    search, (weights, recall_QK) = found[chosen], best[chosen]
    tried = [
        {"logp_weight": search.logp_weight, "recall": _by_k(as_stated[1].mean(0))}
        for search, (as_stated, *_) in zip(found, ways)
    ]
    figures = {"adopted": chosen > 0 or weights is not None, "queries": len(base_QK)}
    if not figures["adopted"]:
        figures["reason"] = "nothing that was tried finds more than what the recipe states"
    return figures | {
        "lookahead": {"logp_weight": search.logp_weight} if chosen else {},
        "expansion": {} if weights is None else {"a": weights.get("path", 0.0), "lexical_weight": weights.get("BM25", 0.0)},
        "score": formula(weights or search.stated),
        "recall": {"stated": _by_k(base_QK.mean(0)), "chosen": _by_k(recall_QK.mean(0))},
        "gain": {str(k): list(interval) for k, interval in zip(KS, bootstrap_means(recall_QK - base_QK))},
        **({"tried": tried} if len(found) > 1 else {}),
    }  # fmt: skip


def formula(weights: dict[str, float]) -> str:
    """`1 · dense + 0.0589 · BM25`; "" of no weights."""
    return " + ".join(f"{weight:g} · {name}" for name, weight in weights.items())


def _ways(judgements: Judgements, search: Found, *, fit: bool) -> list[tuple[dict | None, np.ndarray]]:
    """(weights, None as stated; recall Q×K), of the search as it is, and where `fit` of its candidates in another order."""
    ways = [(None, _recall(judgements, search.product_ids))]
    if fit:
        judged = [
            Judged(feature_MF, np.array([one in wanted for one in ids], bool))
            for feature_MF, ids, wanted in zip(search.features_MF, search.product_ids, judgements.relevant)
        ]
        if (weights := _weights(judged, search.stated)) is not None:
            ranked = [
                [ids[at] for at in np.argsort(-score_M, kind="stable")]
                for ids, score_M in zip(search.product_ids, cross_fitted(judged))
            ]
            ways.append((weights, _recall(judgements, ranked)))
    return ways


def _weights(judged: list[Judged], stated: dict[str, float]) -> dict[str, float] | None:
    """Fitted weights in the scale in which the first term weighs what is stated, to four digits; None where it weighs nothing."""
    if sum(one.says_something for one in judged) < FEWEST:
        return None
    weight_F = fitted(judged)
    if weight_F[0] <= 0:
        return None
    weight_F *= next(iter(stated.values())) / weight_F[0]
    return dict(zip(stated, (float(f"{weight:.4g}") for weight in weight_F)))


def _recall(judgements: Judgements, ranked: list[list[str]]) -> np.ndarray:
    return recalls(ranked, judgements.relevant, KS)


def _by_k(recall_K: np.ndarray) -> dict[str, float]:
    return dict(zip(map(str, KS), recall_K.tolist()))
