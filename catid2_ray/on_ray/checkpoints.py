"""Training checkpoints without pickles: weights as safetensors, each rank's optimiser state for a weights-only load.

A checkpoint is whole when state.json and the files of all ranks are there; Ray Train commits it only after every rank has
handed in its files. DeepSpeed's own format is not used, since reading it back runs a pickle from storage.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from catid2_ray.errors import TrainingError


def save(folder: Path, engine, *, rank: int, world: int, epochs_done: int, history: list[dict]) -> None:
    """Every rank writes its optimiser partition; rank 0 also the weights and state.json."""
    torch.save(_optimiser_state(engine), folder / f"optimiser-{rank}.pt")
    if rank == 0:
        # ZeRO keeps parameters as views of one flat buffer, which safetensors refuses: hence the copies.
        weights = {name: weight.detach().cpu().clone() for name, weight in tensors(engine.module)}
        save_file(weights, folder / "model.safetensors")
        state = {"epochs_done": epochs_done, "world": world, "history": history}
        (folder / "state.json").write_text(json.dumps(state))


def load(folder: Path, engine, *, rank: int, world: int) -> dict:
    """Restore in place and return state.json. TrainingError where a rank's file is missing or the world differs."""
    state_file, rank_file = folder / "state.json", folder / f"optimiser-{rank}.pt"
    if not state_file.exists() or not rank_file.exists():
        raise TrainingError(
            f"the checkpoint {folder} is incomplete: {rank_file.name} or state.json is missing; delete it and rerun"
        )
    state = json.loads(state_file.read_text())
    if state["world"] != world:
        raise TrainingError(
            f"the checkpoint was written by {state['world']} workers, this run has {world}: keep the recipe's number of "
            "workers, or change the seed to start anew"
        )
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, weight in tensors(engine.module):
            weight.copy_(weights[name])
    _restore_optimiser(engine, torch.load(rank_file, weights_only=True))
    return state


def tensors(module):
    """Parameters, and the buffers in which moving averages live."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _partitioned(engine) -> bool:
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _optimiser_state(engine) -> dict:
    if not _partitioned(engine):
        return {"base": engine.optimizer.state_dict(), "partitions": []}
    partitions = [partition.detach().cpu().clone() for partition in engine.optimizer.single_partition_of_fp32_groups]
    return {"base": engine.optimizer.optimizer.state_dict(), "partitions": partitions}


def _restore_optimiser(engine, state: dict) -> None:
    if not _partitioned(engine):
        engine.optimizer.load_state_dict(state["base"])
        return
    engine.optimizer.optimizer.load_state_dict(state["base"])
    for current, saved in zip(engine.optimizer.single_partition_of_fp32_groups, state["partitions"]):
        current.data.copy_(saved)


def weights_changed(engine) -> None:
    """Call after changing weights in place: ZeRO keeps a float32 copy of its own and would overwrite the change."""
    if _partitioned(engine):
        engine.optimizer.refresh_fp32_params()
