"""Work part by part: one Ray Data pass over the list of parts, each handled whole by one of a fixed number of workers.

A part in gives a part out under the same name, so the files and their bytes do not depend on the number of workers, on
their order, or on retries: a part that is done twice is written twice with the same bytes.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from catid2_ray import errors
from catid2_ray.errors import CatidError, StorageError
from catid2_ray.on_ray.machine import cluster, preflight, progress


def our_error(error: BaseException | None) -> CatidError | None:
    """The error of ours among the causes that Ray wrapped around it, if there is one."""
    while error is not None and not isinstance(error, CatidError):
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return error


def _forget_peak() -> None:
    """Worker processes serve one stage after the other: the peak of the stages before is not ours."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The most memory that this process held since `_forget_peak`; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class _Worker:
    def __init__(self, handler_class, arguments: dict):
        _forget_peak()
        self.failed = None
        try:
            preflight.refuse_other_versions()
            self.handler = handler_class(**arguments)
        except CatidError as error:
            self.failed = error

    def __call__(self, batch: dict) -> dict:
        return {"result": [json.dumps(self._handle(json.loads(spec))) for spec in batch["spec"]]}

    def _handle(self, spec: dict) -> dict:
        try:
            if self.failed:
                raise self.failed
            try:
                result = self.handler(spec)
            except StorageError as error:
                if not error.transient:
                    raise
                # Requests were tried for as long as the store has patience, but for a read that broke off in the middle.
                result = self.handler(spec)
            return result | {"peak_bytes": _peak_bytes()}
        except CatidError as error:  # as a value: what Ray wraps around an exception does not keep its class
            return {"position": spec["position"], "error": [type(error).__name__, str(error)]}


_HELD: dict[str, _Worker] = {}  # of this process: the handler of the pass that it works for, by the pass's token


def _work(batch: dict, *, token: str, handler_class: type[Callable], arguments: dict) -> dict:
    if token not in _HELD:
        _HELD.clear()
        _HELD[token] = _Worker(handler_class, arguments)
    return _HELD[token](batch)


def map_parts(
    handler_class: type[Callable],
    arguments: dict,
    specs: list[dict],
    *,
    workers: int,
    label: str,
    unit: str,
    num_gpus=0,
    actors: bool = False,
) -> list[dict]:
    """Build `handler_class(**arguments)` in each worker and call it with every spec; returns the results in the order of specs.

    Tasks of one pass find the handler that an earlier one left in their process, and processes go on from pass to pass, so
    that a pass starts in a moment. `actors`: a fixed pool with a process each, for handlers that are dear to build.

    Specs and results are small JSON dicts (names, counts, digests); rows go through the store. A spec's "rows" moves the
    progress bar. Each result gains "peak_bytes", the most memory that its worker held so far.
    """
    numbered = [{"spec": json.dumps({**spec, "position": position})} for position, spec in enumerate(specs)]
    results = []
    with progress.bar(label, sum(spec["rows"] for spec in specs), unit) as shown:
        for text in _results(handler_class, arguments, numbered, workers=workers, num_gpus=num_gpus, actors=actors):
            results.append(json.loads(text))
            if "error" in results[-1]:
                kind, message = results[-1]["error"]
                raise getattr(errors, kind)(message)
            shown.advance(specs[results[-1]["position"]]["rows"])
    return sorted(results, key=lambda result: result["position"])


def _results(
    handler_class: type[Callable], arguments: dict, numbered: list[dict], *, workers: int, num_gpus, actors: bool
) -> Iterator[str]:
    """The results of `numbered` specs as JSON, in any order."""
    if cluster.is_without_ray():
        worker = _Worker(handler_class, arguments)
        for one in numbered:
            yield from worker({"spec": [one["spec"]]})["result"]
        return
    dataset, size = (
        ray.data.from_items(numbered, override_num_blocks=len(numbered)),
        max(1, min(workers, len(numbered))),
    )
    limits = {"batch_size": 1, "num_cpus": 1, "num_gpus": num_gpus or None}
    if num_gpus:  # else the selector of all data work, which keeps off the nodes with GPUs
        limits["label_selector"] = cluster.on_gpu_pool()
    if actors or num_gpus:
        pool = ActorPoolStrategy(size=size)
        dataset = dataset.map_batches(_Worker, fn_constructor_args=(handler_class, arguments), compute=pool, **limits)
    else:
        given = {"token": uuid.uuid4().hex, "handler_class": handler_class, "arguments": arguments}
        dataset = dataset.map_batches(_work, fn_kwargs=given, compute=TaskPoolStrategy(size=size), **limits)
    for row in dataset.iter_rows():
        yield row["result"]
