"""Constant load on a service: requests without a pause, and what came of each."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import httpx


class Answered(NamedTuple):
    release: str
    query: str
    products: list[str]


class Failed(NamedTuple):
    """`began`, `ended`: by `time.monotonic()`."""

    began: float
    ended: float
    what: str


class Load:
    """`askers` threads that ask `queries` until `end`. `seen`, `failed`: of all answers so far."""

    def __init__(self, base: str, queries: Sequence[str], *, askers: int = 8):
        self.base, self.queries, self.askers = base, list(queries), askers
        self.seen: list[Answered] = []
        self.failed: list[Failed] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(askers)]
        for one in self._threads:
            one.start()

    def _ask(self, asker: int) -> None:
        number = asker
        with httpx.Client(base_url=self.base, timeout=60) as client:
            while asker < self.askers:
                query, began = self.queries[number % len(self.queries)], time.monotonic()
                number += 1
                try:
                    answer = client.post("/v1/retrieve", json={"query": query, "k": 5})
                    what = None if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
                except httpx.HTTPError as error:
                    what = repr(error)
                if what is not None:
                    self.failed.append(Failed(began, time.monotonic(), what))
                    continue
                body = answer.json()
                self.seen.append(Answered(body["release"], query, [one["product_id"] for one in body["products"]]))

    def more(self, answers: int = 40, *, seconds: float = 120) -> None:
        """Wait until so many more answers have come."""
        until, deadline = len(self.seen) + answers, time.monotonic() + seconds
        while len(self.seen) < until:
            assert time.monotonic() < deadline, f"{len(self.seen)} answers, {self.failed[-1:]}"
            time.sleep(0.01)

    def fewer(self, askers: int) -> None:
        """Go on with so many."""
        self.askers = askers

    def end(self) -> None:
        self.askers = 0
        for one in self._threads:
            one.join(60)
