"""Requests wait here for a search that takes one batch at a time: the next batch is what waits when the last one ends.

Unusual: Serve's own @serve.batch closes a batch a few milliseconds after its first request, also while another one is being
searched, so that batches stay small just when a replica is busy; and it searches for callers who have gone.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from catid2_ray.on_ray.serve.refusals import Unserved


class Batch(NamedTuple):
    """What there is to tell of a batch: requests searched, requests dropped, seconds that its oldest request waited and that the
    search took."""

    searched: int
    dropped: int
    waited_s: float
    search_s: float


class _Waiting(NamedTuple):
    request: Any
    came: float
    deadline: float | None
    answer: asyncio.Future


class Batches:
    """`search` (a list of requests → their answers) gets at most `size` requests at a time in `executor`, oldest first, and a
    function that takes the number of a request and its answer, where that is there before the others'.

    `wait_s`: how long the first request that an idle replica gets waits for others. `most_waiting`: further ones are refused.
    Requests whose caller has gone, or whose deadline is over, are dropped before they cost a search. A search that fails is
    made again for each of its requests alone, so that a bad one fails alone. `tell` is called after each batch. For one event
    loop.
    """

    def __init__(
        self, search: Callable[[list, Callable[[int, Any], None]], list], executor: Executor, *, size: int, wait_s: float,
        most_waiting: int, tell: Callable[[Batch], None] | None = None,
    ):  # fmt: skip
        self.search, self.executor, self.tell = search, executor, tell
        self.size, self.wait_s, self.most_waiting = size, wait_s, most_waiting
        self._waiting: deque[_Waiting] = deque()
        self._full, self._task = asyncio.Event(), None
        self._began: float | None = None  # when the search that runs now began

    @property
    def searching_s(self) -> float:
        """Seconds that the search which runs now has taken so far; 0 where none does."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def ask(self, request, *, deadline: float | None = None):
        """The answer of `search`. `deadline`: a time of `time.monotonic()`. Raises Unserved when too many requests wait (503), or
        when the deadline is over before the search begins (504)."""
        if len(self._waiting) >= self.most_waiting:
            raise Unserved(503, f"{self.most_waiting} requests wait already: try again, or add replicas")
        one = _Waiting(request, time.monotonic(), deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        if len(self._waiting) >= self.size:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await one.answer

    async def _run(self) -> None:
        try:
            await self._wait_for_company()
            while self._waiting:
                await self._next_batch()
        except Exception as error:  # a fault of ours must not leave callers waiting
            while self._waiting:
                if not (answer := self._waiting.popleft().answer).done():
                    answer.set_exception(error)
            raise
        finally:
            self._task = None

    async def _wait_for_company(self) -> None:
        self._full = asyncio.Event()
        if self.wait_s and len(self._waiting) < self.size:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self.wait_s)

    async def _next_batch(self) -> None:
        now, batch, dropped = time.monotonic(), [], 0
        while self._waiting and len(batch) < self.size:
            one = self._waiting.popleft()
            if one.answer.done():
                dropped += 1
            elif one.deadline is not None and one.deadline <= now:
                dropped += 1
                one.answer.set_exception(
                    Unserved(504, f"it waited {now - one.came:.3f} s for a search; its time is over")
                )
            else:
                batch.append(one)
        if batch:
            await self._answer(batch)
        if self.tell:
            oldest = min((one.came for one in batch), default=now)
            self.tell(Batch(len(batch), dropped, now - oldest, time.monotonic() - now))

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._searched(batch)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    if not one.answer.done():
                        await self._answer([one])
                return
            answers = [error]
        for one, answer in zip(batch, answers):
            if one.answer.done():
                continue
            if isinstance(answer, Exception):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)

    async def _searched(self, batch: list[_Waiting]) -> list:
        loop = asyncio.get_running_loop()

        def give(one: _Waiting, answer: Any) -> None:
            if not one.answer.done():
                one.answer.set_result(answer)

        def early(number: int, answer: Any) -> None:
            loop.call_soon_threadsafe(give, batch[number], answer)

        self._began = time.monotonic()
        try:
            return await loop.run_in_executor(self.executor, self.search, [one.request for one in batch], early)
        finally:
            self._began = None
