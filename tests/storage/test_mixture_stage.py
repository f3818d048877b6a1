"""Weights chosen on validation queries: what is decided of what was found, what is then served, and what stays as it was."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.config import Recipe
from catid2_ray.config.serving import LookaheadRecipe
from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.on_ray.pipeline import planned
from catid2_ray.on_ray.stages import evaluate, lay_out, mixture
from catid2_ray.on_ray.stages.mixture import FEWEST, Found, decided
from catid2_ray.retrieval.mixture import Judged, fitted

STATED = {"dense": 1.0, "BM25": 0.5}
FITTED = {"expansion": {"a": 0, "dense": "dot", "lexical_weight": 0.5}}


def judgements(relevant) -> Judgements:
    names = [f"q{number:03d}" for number in range(len(relevant))]
    nothing = [set() for _ in names]
    return Judgements(query_ids=names, queries=names, relevant=relevant, seen=nothing, unseen=nothing, dropped_pairs=0)


def found(count: int = 2 * FEWEST, *, stated=STATED, logp_weight=None, seed: int = 0):
    """Queries whose relevant products have the highest dense + .05 · BM25, but are listed by the stated weights."""
    random, ids, features, relevant = np.random.default_rng(seed), [], [], []
    for _ in range(count):
        feature_MF = np.column_stack([random.normal(size=40), random.gamma(3, 4, 40)])
        best = np.argsort(-feature_MF @ [1, 0.05])[:3]
        order = np.argsort(-feature_MF @ list(stated.values()))
        ids.append([f"p{row}" for row in order])
        features.append(feature_MF[order])
        relevant.append({f"p{row}" for row in best})
    return judgements(relevant), Found(logp_weight, stated, ids, features)


def test_fitted_weights_are_adopted_where_they_find_more_and_are_readable():
    judged, search = found()
    figures = json.loads(json.dumps(decided(judged, [search], fit=True)))
    by_query = zip(search.features_MF, search.product_ids, judged.relevant)
    weights_F = fitted([Judged(np.array(rows), np.isin(ids, list(wanted))) for rows, ids, wanted in by_query])
    expected = float(f"{weights_F[1] / weights_F[0]:.4g}")
    assert figures["adopted"] and figures["expansion"] == {"a": 0.0, "lexical_weight": expected}
    assert expected == pytest.approx(0.05, rel=0.2) and figures["score"] == f"1 · dense + {expected:g} · BM25"
    assert figures["recall"]["chosen"]["10"] > figures["recall"]["stated"]["10"] + 0.2
    mean, low, high = figures["gain"]["10"]
    assert mean == pytest.approx(figures["recall"]["chosen"]["10"] - figures["recall"]["stated"]["10"])
    assert 0 < low < mean < high and figures["queries"] == len(judged.queries) and "tried" not in figures


def test_what_is_stated_stays_where_nothing_finds_more_or_too_few_queries_tell():
    judged, search = found(stated={"dense": 1.0, "BM25": 0.05})
    figures = decided(judged, [search], fit=True)
    assert not figures["adopted"] and figures["expansion"] == figures["lookahead"] == {}
    assert figures["reason"] == "nothing that was tried finds more than what the recipe states"
    few, search = found(FEWEST - 1)
    assert not decided(few, [search], fit=True)["adopted"]
    judged, search = found()
    assert not decided(judged, [search], fit=False)["adopted"]


def test_a_fit_that_gives_the_first_term_nothing_is_not_served():
    judged, search = found()
    turned = [feature_MF * [-1, 1] for feature_MF in search.features_MF]
    assert not decided(judged, [search._replace(features_MF=turned)], fit=True)["adopted"]


def test_the_weight_of_log_p_is_that_of_the_search_which_finds_most():
    judged, search = found(stated={"dense": 1.0, "BM25": 0.05})
    worse = search._replace(product_ids=[ids[::-1] for ids in search.product_ids], logp_weight=0.003)
    figures = decided(judged, [worse, search._replace(logp_weight=0.03), worse._replace(logp_weight=0.1)], fit=False)
    assert figures["adopted"] and figures["lookahead"] == {"logp_weight": 0.03} and figures["expansion"] == {}
    assert [one["logp_weight"] for one in figures["tried"]] == [0.003, 0.03, 0.1]
    lucky = [ids[::-1] if number else search.product_ids[0] for number, ids in enumerate(search.product_ids)]
    by_luck = decided(judged, [worse, search._replace(product_ids=lucky, logp_weight=0.03)], fit=False)
    assert not by_luck["adopted"] and by_luck["lookahead"] == {}, (
        "one query in a hundred finds more, which may be chance"
    )


def test_the_recipe_says_whether_there_is_anything_to_fit():
    def fits(**expansion):
        return Recipe.build({"catalog": {"root": "x"}, "serving": {"expansion": expansion}}).serving.fits_weights

    assert fits() and not fits(weights="stated") and not fits(a=0) and fits(a=0, lexical_weight=0.1)
    assert not fits(dense="none", order="value") and fits(dense="none", order="value", lexical_weight=0.1)
    nothing = Recipe.build({"catalog": {"root": "x"}, "serving": {"node_depth": 0}})
    assert not nothing.serving.fits_weights and "mixture" not in planned(nothing, "evaluation")
    tries = Recipe.build({"catalog": {"root": "x"}, "serving": {"lookahead": {"try_logp_weight": [0.1]}}})
    assert planned(tries, "evaluation")[-2:] == ("mixture", "evaluation")
    assert not tries.serving.model_copy(update={"lookahead": LookaheadRecipe(logp_weight=0)}).tried


def test_a_stored_recipe_stated_its_weights():
    stored = Recipe.stored({"catalog": {"root": "x"}, "serving": {"expansion": {"a": 0.5}}})
    assert stored.serving.expansion.weights == "stated" and not stored.serving.fits_weights
    assert Recipe.stored({"catalog": {"root": "x"}, "serving": {"expansion": None}}).serving.expansion is None
    assert Recipe.stored({"catalog": {"root": "x"}}).serving.expansion is None


def job_of(store, parts, previous=None, **serving):
    """A job whose stages are made in this process; what they would be made of is kept in `asked`."""
    asked = {}

    def produce(kind, settings, parents, work):
        asked[kind] = (settings, set(parents))
        digests = {role: part.digest for role, part in parents.items()}
        return work(Attempt(store, kind, settings=settings, parents=digests, recipe={}))

    recipe = Recipe.build({"catalog": {"root": "x"}, "serving": serving})
    previous = previous and SimpleNamespace(parts=previous)
    return SimpleNamespace(recipe=recipe, store=store, produce=produce, previous=previous, asked=asked)


@pytest.fixture
def parts(chain, local_store):
    made = chain(local_store, "one")
    made["serving"].settings.update(
        expansion={"a": 0.0, "dense": "dot", "lexical_weight": 0.5},
        search="lookahead", lookahead={"logp_weight": 0.003}, encoder=None,
    )  # fmt: skip
    made["pairs"].metrics["pairs_table"] = "pairs.parquet"
    made.pop("mixture")
    return made


def test_what_is_served_has_the_weights_that_were_chosen(local_store, parts, monkeypatch):
    judged, search = found()
    monkeypatch.setattr(mixture, "_judged", lambda job, parts: judged)
    asked = []

    def searched(handler_class, arguments, specs, **_):
        asked.extend(spec["logp_weight"] for spec in specs)
        rows = [[judged.queries.index(query) for query in spec["queries"]] for spec in specs]
        return [
            {
                "stated": STATED, "product_ids": [search.product_ids[row] for row in part],
                "features": [search.features_MF[row].tolist() for row in part],
            }
            for part in rows
        ]  # fmt: skip

    monkeypatch.setattr(mixture, "map_parts", searched)
    job = job_of(local_store, parts, **FITTED, lookahead={"try_logp_weight": [0.1]})
    parts["mixture"] = mixture.run(job, parts)
    assert asked == [0.003] * 2 + [0.1] * 2
    settings, parents = job.asked["mixture"]
    assert parents == {"catalog", "pairs", "ids", "examples", "generator", "serving", "node_vectors"}
    figures = parts["mixture"].metrics
    assert json.loads(local_store.read(parts["mixture"].file("mixture.json")))["score"] == figures["score"]
    served = releases.retriever_settings(parts, release="r")
    assert served["expansion"] == {"dense": "dot", **figures["expansion"]} and figures["adopted"]
    assert served["lookahead"] == {"logp_weight": 0.003} and parts["serving"].settings["expansion"]["a"] == 0
    releases.check_parts(parts)


def test_without_enough_queries_the_reason_is_kept_and_nothing_is_searched(local_store, parts, monkeypatch):
    monkeypatch.setattr(mixture, "map_parts", lambda *_, **__: pytest.fail("searched"))
    monkeypatch.setattr(evaluate, "pairs_of_split", lambda *_: SimpleNamespace(num_rows=3))
    monkeypatch.setattr(evaluate, "judge", lambda *_, **__: judgements([{"p"}] * 3))
    before = releases.retriever_settings(parts, release="r")
    parts["mixture"] = mixture.run(job_of(local_store, parts, **FITTED), parts)
    assert "3 validation queries have a relevant product, at least 50" in parts["mixture"].metrics["reason"]
    assert releases.retriever_settings(parts, release="r") == before
    assert mixture.run(job_of(local_store, parts, search="beam"), parts) is None


def test_an_append_without_pairs_keeps_the_weights_if_they_answer_the_same_question(local_store, parts, monkeypatch):
    monkeypatch.setattr(mixture, "_judged", lambda *_: "too few")
    before = {**parts, "mixture": mixture.run(job_of(local_store, parts, **FITTED), parts)}
    parts["pairs"] = replace(parts["pairs"], metrics={"pairs_table": None})
    assert mixture.run(job_of(local_store, parts, before, **FITTED), parts) is before["mixture"]
    other = replace(parts["generator"], digest="other")
    assert mixture.run(job_of(local_store, parts, before, **FITTED), {**parts, "generator": other}) is None
    tries = {**FITTED, "lookahead": {"try_logp_weight": [0.2]}}
    assert mixture.run(job_of(local_store, parts, before, **tries), parts) is None


def test_deciding_about_weights_lays_nothing_out_anew_and_evaluates_what_is_served(parts):
    parts["catalog"].metrics["width"] = None
    one, two = (
        Recipe.build({"catalog": {"root": "x"}, "serving": {"expansion": {"weights": weights}, **more}})
        for weights, more in (("stated", {}), ("fitted", {"lookahead": {"try_logp_weight": [0.1]}}))
    )
    assert lay_out.settings_of(one, parts) == lay_out.settings_of(two, parts)
    parts["mixture"] = SimpleNamespace(metrics={"adopted": True, "lookahead": {"logp_weight": 0.1}})
    assert evaluate.ahead_of(two, parts)["lookahead"]["logp_weight"] == 0.1
    read = {}
    for methods in (["served"], ["lookahead"], ["beam"]):
        recipe = Recipe.build({"catalog": {"root": "x"}, "evaluation": {"methods": methods}})
        job = SimpleNamespace(recipe=recipe, produce=lambda kind, settings, parents, work: set(parents))
        read[methods[0]] = "mixture" in evaluate.run(job, parts)
    assert read == {"served": True, "lookahead": True, "beam": False}
