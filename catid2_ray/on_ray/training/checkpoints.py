"""Training checkpoints without pickles: weights as safetensors, each rank's optimiser state for a weights-only load.

A checkpoint is whole when state.json is there and every file that it names, with its size; a partial one is never resumed
from, the one before is used. Each has a folder name of its own, so that attempts never mix. DeepSpeed's own format is not
used, since reading it back runs a pickle from storage; and ours is cut anew for another number of workers by arithmetic.
"""

import contextlib
import json
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import TrainingError
from catid2_ray.on_ray.machine import progress, scratch

STATE, WEIGHTS, BEST = "state.json", "model.safetensors", "best.safetensors"


@dataclass
class State:
    """How far a training is, the same on all ranks, and what state.json holds.

    epoch, step     of the next step, both from 0; step counts inside the epoch
    sums            of loss and terms over the steps of this epoch so far, divided by all its steps
    history         a record per epoch that is done
    best            {"epoch", "score"} of the best validation so far, and how many came "since"
    finished        nothing is left to train and export/ is in the checkpoint
    world, batch    workers, and rows of a global batch, that it was written with
    files           bytes by name, of all ranks
    written         when, in UTC: tells a training that was abandoned from one that runs
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    best: dict | None = None
    finished: bool = False
    world: int = 0
    batch: int = 0
    files: dict[str, int] = field(default_factory=dict)
    written: str = ""


def new_name(steps: int) -> str:
    """The folder of a checkpoint after so many steps; newer ones sort behind older ones."""
    return f"step-{steps:010d}-{uuid.uuid4().hex[:8]}"


def newest_whole(store: Store, folder: str) -> tuple[str, State] | None:
    """(folder, state) of the newest whole checkpoint below a run's folder, passing over partial ones with a line in the log."""
    for name in sorted((name for name in store.names(folder) if name.startswith("step-")), reverse=True):
        found, fault = _state_of(store, f"{folder}/{name}")
        if not fault:
            return f"{folder}/{name}", found
        progress.event("checkpoint_skipped", folder=store.uri_of(f"{folder}/{name}"), reason=f"'{fault}'")
    return None


def _state_of(store: Store, folder: str) -> tuple[State | None, str]:
    """(its state, what is wrong with a partial checkpoint)."""
    sizes = store.sizes(folder)
    if STATE not in sizes:
        return None, f"{STATE} is missing"
    try:
        state = State(**json.loads(store.read(f"{folder}/{STATE}")))
    except (ValueError, TypeError) as error:
        return None, f"{STATE} is not whole or of another version: {error}"
    for name, size in state.files.items():
        if sizes.get(name) != size:
            return None, f"{name} has {sizes.get(name, 'no')} bytes, expected {size}"
    return state, ""


@contextlib.contextmanager
def opened(store: Store, folder: str, state: State, prefixes: tuple[str, ...]):
    """A local folder that holds the checkpoint's files of these beginnings: itself where it is local, else a download."""
    if not store.is_s3:
        yield Path(store.path(folder))
        return
    with scratch.folder("checkpoint") as local:
        for name in state.files:
            if name.startswith(prefixes):
                store.download(f"{folder}/{name}", local / name)
        yield local


def save(folder: Path, engine, *, rank: int) -> None:
    """Every rank writes its optimiser partition; rank 0 also the weights."""
    torch.save(_optimiser_state(engine), folder / _optimiser_file(rank))
    if rank == 0:
        # ZeRO keeps parameters as views of one flat buffer, which safetensors refuses: hence the copies.
        save_file(copies(engine.module), folder / WEIGHTS)


def seal(folder: Path, state: State, *, rank: int, device: str = "cpu") -> None:
    """Last of all, on every rank: rank 0 writes state.json over its own folder and the other ranks' files."""
    size_R = _sizes_of_ranks((folder / _optimiser_file(rank)).stat().st_size, state.world, device)
    if rank == 0:
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        state.files = files | {_optimiser_file(other): size for other, size in enumerate(size_R)}
        state.written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        (folder / STATE).write_text(json.dumps(asdict(state)))


def _optimiser_file(rank: int) -> str:
    return f"optimiser-{rank}.pt"


def _sizes_of_ranks(size: int, world: int, device: str) -> list[int]:
    if world == 1:
        return [size]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([size], device=device))
    return [int(other) for other in sizes]


def load(folder: Path, engine, state: State, *, rank: int, world: int, batch: int, whole_rows: bool) -> None:
    """Restore weights and optimiser in place. `whole_rows`: the rows of a step do not depend on the number of workers.

    TrainingError where the run has another number of workers than the checkpoint and its rows depend on that, or where
    another number of workers, or fewer rows, lead to another global batch.
    """
    if state.world != world and not whole_rows:
        raise TrainingError(
            f"the checkpoint was written by {state.world} workers, this run has {world}: each worker draws from its own range of "
            "the rows, so that the training could not be continued exactly. Keep the recipe's number of workers, or change the "
            "seed to start anew"
        )
    if state.batch != batch:
        raise TrainingError(
            f"the checkpoint was written with a batch of {state.batch} rows by {state.world} workers, this run with {world} has "
            f"{batch}: its steps are others. Keep the number of workers, or one by which the batch divides"
        )
    set_weights(engine.module, load_file(folder / WEIGHTS))
    ranks = [rank] if state.world == world else range(state.world)
    # A rank's file names the device that it sat on, which may be another one's now, or none: the engine moves what it loads.
    states = [torch.load(folder / _optimiser_file(one), weights_only=True, map_location="cpu") for one in ranks]
    if not _partitioned(engine):
        engine.optimizer.load_state_dict(states[0]["base"])
        return
    if state.world != world:
        states = [_cut_anew(states, engine, rank=rank, world=world)]
    engine.optimizer.optimizer.load_state_dict(states[0]["base"])
    for current, saved in zip(engine.optimizer.single_partition_of_fp32_groups, states[0]["partitions"], strict=True):
        current.data.copy_(saved)


def tensors(module):
    """Parameters, and the buffers in which moving averages live."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def copies(module) -> dict[str, torch.Tensor]:
    """All weights and buffers, copied to the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in tensors(module)}


def set_weights(module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in tensors(module):
            weight.copy_(weights[name])


def keep_files(source: Path, target: Path) -> None:
    """Copy a folder of a checkpoint, where there is one, so that the next checkpoint holds it too."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def weights_changed(engine) -> None:
    """Call after changing weights in place: ZeRO keeps a float32 copy of its own and would overwrite the change."""
    if _partitioned(engine):
        engine.optimizer.refresh_fp32_params()


def _partitioned(engine) -> bool:
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _optimiser_state(engine) -> dict:
    if not _partitioned(engine):
        return {"base": engine.optimizer.state_dict(), "partitions": []}
    partitions = [partition.detach().cpu().clone() for partition in engine.optimizer.single_partition_of_fp32_groups]
    return {"base": engine.optimizer.optimizer.state_dict(), "partitions": partitions}


def _cut_anew(states: list[dict], engine, *, rank: int, world: int) -> dict:
    """This rank's optimiser state out of those of all ranks of another world.

    ZeRO-1 and 2 lay the parameters of a group end to end, pad the end to a multiple of the ranks, and cut equally; AdamW works
    element by element. So: joined, without the padding, padded and cut for this world, nothing is rounded.
    """
    groups = engine.optimizer.bit16_groups
    length_G = [partition.numel() for partition in engine.optimizer.single_partition_of_fp32_groups]

    def cut(pieces: list[torch.Tensor], group: int) -> torch.Tensor:
        joined = torch.cat(pieces)[: sum(parameter.numel() for parameter in groups[group])]
        padded = torch.nn.functional.pad(joined, (0, world * length_G[group] - joined.numel()))
        return padded[rank * length_G[group] : (rank + 1) * length_G[group]].clone()

    base = states[0]["base"]
    cut_states = {
        group: {
            name: cut([state["base"]["state"][group][name] for state in states], group) if value.ndim else value
            for name, value in values.items()
        }
        for group, values in base["state"].items()
    }
    partitions = [cut([state["partitions"][group] for state in states], group) for group in range(len(groups))]
    return {"base": {**base, "state": cut_states}, "partitions": partitions}
