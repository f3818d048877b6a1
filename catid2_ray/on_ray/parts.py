"""Work part by part: one Ray Data pass over the list of parts, each handled whole by an actor of a fixed-size pool.

A part in gives a part out under the same name, so the files and their bytes do not depend on the number of actors, on
their order, or on retries: a part that is done twice is written twice with the same bytes.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import ray
from ray.data import ActorPoolStrategy

from catid2_ray.errors import CatidError
from catid2_ray.on_ray import progress


def our_error(error: BaseException | None) -> CatidError | None:
    """The error of ours among the causes that Ray wrapped around it, if there is one."""
    while error is not None and not isinstance(error, CatidError):
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def our_errors():
    """Raise the error of ours that a task or actor raised, instead of what Ray wrapped around it."""
    try:
        yield
    except Exception as error:
        inner = our_error(error)
        if inner is None or inner is error:
            raise
        raise type(inner)(*inner.args) from None


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
        self.handler = handler_class(**arguments)

    def __call__(self, batch: dict) -> dict:
        results = [self.handler(json.loads(spec)) | {"peak_bytes": _peak_bytes()} for spec in batch["spec"]]
        return {"result": [json.dumps(result) for result in results]}


def map_parts(
    handler_class: type[Callable],
    arguments: dict,
    specs: list[dict],
    *,
    workers: int,
    label: str,
    unit: str,
    num_gpus=0,
) -> list[dict]:
    """Build `handler_class(**arguments)` in each actor and call it with every spec; returns the results in the order of specs.

    Specs and results are small JSON dicts (names, counts, digests); rows go through the store. A spec's "rows" moves the
    progress bar. Each result gains "peak_bytes", the most memory that its actor held so far.
    """
    numbered = [{"spec": json.dumps({**spec, "position": position})} for position, spec in enumerate(specs)]
    dataset = ray.data.from_items(numbered, override_num_blocks=len(numbered)).map_batches(
        _Worker,
        batch_size=1,
        fn_constructor_args=(handler_class, arguments),
        compute=ActorPoolStrategy(size=max(1, min(workers, len(specs)))),
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
    results = []
    with our_errors(), progress.bar(label, sum(spec["rows"] for spec in specs), unit) as shown:
        for row in dataset.iter_rows():
            results.append(json.loads(row["result"]))
            shown.advance(specs[results[-1]["position"]]["rows"])
    return sorted(results, key=lambda result: result["position"])
