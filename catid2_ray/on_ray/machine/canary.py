"""Queries whose answers the evaluation kept: asked of a release before it is published, and of a replica before it serves one."""

import json
import statistics
import time
from typing import NamedTuple

from catid2_ray.artifacts.manifest import Manifest, read_proven
from catid2_ray.artifacts.stages import ANSWERS
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ReleaseError
from catid2_ray.retrieval.retriever import Retriever

CANARY_QUERY = "canary"
SAME_ANSWERS = 0.95  # of the products that the evaluation found, so many must be found again
_BATCH, _K = 16, 10


class AnswersDiffer(ReleaseError):
    """The release does not answer as it did when it was evaluated; `share` of the products are the same."""

    share: float | None = None


class GivenBack(NamedTuple):
    """Of `expected` products that the evaluation found, `found` are found again; of all queries, `empty` find none."""

    found: int
    expected: int
    empty: int

    @property
    def share(self) -> float:
        return self.found / max(1, self.expected)


def kept_answers(store: Store, parts: dict[str, Manifest]) -> dict[str, list[str]]:
    """Query → the best products that an evaluation found by what was served then. Empty where none was kept."""
    evaluation = parts["evaluation"]
    return json.loads(read_proven(store, evaluation, ANSWERS)) if evaluation.named(ANSWERS) else {}


def stored_answers(store: Store, parts: dict[str, Manifest]) -> dict[str, list[str]]:
    """The same, of these very IDs: empty where an append took the evaluation over from the release before."""
    answers = kept_answers(store, parts)
    return answers if answers and parts["evaluation"].parents["ids"] == parts["ids"].digest else {}


def given_back(retriever: Retriever, answers: dict[str, list[str]]) -> GivenBack:
    queries, found, empty = list(answers), 0, 0
    k = max(1, *map(len, answers.values()))
    for start in range(0, len(queries), _BATCH):
        asked = queries[start : start + _BATCH]
        for query, hits in zip(asked, retriever.retrieve([one[: retriever.max_query_chars] for one in asked], k=k)):
            found += len({hit.product_id for hit in hits} & set(answers[query]))
            empty += not hits
    return GivenBack(found, sum(map(len, answers.values())), empty)


def check_answers(retriever: Retriever, answers: dict[str, list[str]], name: str) -> float | None:
    """The share of the products that its evaluation found which the release, before any change, finds again; None where none were
    kept. Raises AnswersDiffer below SAME_ANSWERS."""
    if not answers:
        retriever.retrieve([CANARY_QUERY], k=1)
        return None
    asked = given_back(retriever, answers)
    if asked.found < SAME_ANSWERS * asked.expected:
        error = AnswersDiffer(
            f"release {name} gives back {asked.found} of the {asked.expected} products that its evaluation found for "
            f"{len(answers)} queries, less than {SAME_ANSWERS:.0%}: another device, precision or version may be the cause; "
            "evaluate it there, or publish it again"
        )
        error.share = asked.share
        raise error
    return asked.share


def seconds_in_turns(retrievers: list[Retriever], queries: list[str]) -> list[float]:
    """The median seconds of a query by each, asked one by one and in turns, so that what else the machine does meets all."""
    taken: list[list[float]] = [[] for _ in retrievers]
    for number, query in enumerate([CANARY_QUERY, *queries]):
        for retriever, seconds in list(zip(retrievers, taken))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            retriever.retrieve([query[: retriever.max_query_chars]], k=_K)
            if number:  # the first warms up
                seconds.append(time.perf_counter() - start)
    return list(map(statistics.median, taken))
