"""Batches of a replica: they fill while a search runs, and nobody is searched for whom nobody waits."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray.serve")

from catid2_ray.on_ray.serve.batches import Batches
from catid2_ray.on_ray.serve.refusals import Unserved


class Search:
    """Answers n with 10 n once it may go on; -1 makes the whole batch fail. `batches`: what it was asked."""

    def __init__(self):
        self.batches, self.may, self.begun, self.hurried = [], threading.Event(), threading.Event(), set()
        self.may.set()

    def __call__(self, requests: list[int], early) -> list[int]:
        self.batches.append(requests)
        self.begun.set()
        for place, one in enumerate(requests):
            if one in self.hurried:
                early(place, one)
        assert self.may.wait(10)
        if -1 in requests:
            raise ValueError("no such query")
        return [10 * one for one in requests]


@pytest.fixture
def search() -> Search:
    return Search()


def run(test, search, **options):
    """`test` (a coroutine function of Batches), and the batches that were told of."""
    told = []

    async def whole():
        with ThreadPoolExecutor(1) as executor:
            settings = {"size": 4, "wait_s": 0.0, "most_waiting": 100} | options
            await test(Batches(search, executor, tell=told.append, **settings))

    asyncio.run(whole())
    return told


async def held(search: Search, batches: Batches) -> asyncio.Task:
    """A request that is being searched until `search.may` is set."""
    search.may.clear()
    first = asyncio.create_task(batches.ask(0))
    assert await asyncio.to_thread(search.begun.wait, 10)
    return first


def test_a_request_may_be_answered_before_its_batch_ends(search):
    async def test(batches):
        search.hurried = {7}
        first = await held(search, batches)
        search.begun.clear()
        search.may.set()
        hurried, other = (asyncio.create_task(batches.ask(number)) for number in (7, -1))
        assert await first == 0
        assert await asyncio.wait_for(hurried, 10) == 7, "and not searched again where another one fails"
        with pytest.raises(ValueError, match="no such query"):
            await other
        assert search.batches[1:] == [[7, -1], [-1]]

    run(test, search)


def test_a_batch_fills_while_another_is_searched(search):
    async def test(batches):
        first = await held(search, batches)
        others = [asyncio.create_task(batches.ask(number)) for number in range(1, 10)]
        await asyncio.sleep(0.05)  # Serve's batches would have closed several times
        assert batches.waiting == 9
        search.may.set()
        assert await asyncio.gather(first, *others) == [10 * number for number in range(10)]

    told = run(test, search)
    assert search.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [one.searched for one in told] == [1, 4, 4, 1] and told[1].waited_s > 0.04


def test_the_first_request_waits_for_company_no_longer_than_it_takes_to_fill(search):
    async def test(batches):
        one = asyncio.create_task(batches.ask(1))
        await asyncio.sleep(0.01)
        assert search.batches == []
        assert await asyncio.gather(one, *map(batches.ask, (2, 3, 4))) == [10, 20, 30, 40]

    run(test, search, wait_s=30.0)
    assert search.batches == [[1, 2, 3, 4]]
    run(lambda batches: batches.ask(5), search, wait_s=0.01)
    assert search.batches[1:] == [[5]]


def test_whoever_has_gone_or_is_late_costs_no_search(search):
    async def test(batches):
        first = await held(search, batches)
        gone = asyncio.create_task(batches.ask(1))
        late = asyncio.create_task(batches.ask(2, deadline=time.monotonic() + 0.01))
        patient = asyncio.create_task(batches.ask(3, deadline=time.monotonic() + 60))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        search.may.set()
        assert await first == 0 and await patient == 30
        with pytest.raises(Unserved, match="its time is over") as error:
            await late
        assert error.value.status == 504

    told = run(test, search)
    assert search.batches == [[0], [3]] and [one.dropped for one in told] == [0, 2]


def test_more_than_may_wait_are_refused_at_once(search):
    async def test(batches):
        first = await held(search, batches)
        waiting = [asyncio.create_task(batches.ask(number)) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Unserved, match="2 requests wait already") as error:
            await batches.ask(3)
        assert error.value.status == 503
        search.may.set()
        assert await asyncio.gather(first, *waiting) == [0, 10, 20]

    run(test, search, most_waiting=2)


def test_a_bad_request_fails_alone(search):
    async def test(batches):
        first = await held(search, batches)
        others = [asyncio.create_task(batches.ask(number)) for number in (1, -1, 2)]
        await asyncio.sleep(0)
        search.may.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [answers[0], answers[1], answers[3]] == [0, 10, 20] and isinstance(answers[2], ValueError)
        assert await batches.ask(7) == 70

    run(test, search)
