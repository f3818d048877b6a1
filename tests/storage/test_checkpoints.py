"""Which checkpoint a run goes on from, on a local folder and on S3: the newest whole one; what is cut anew for other worlds."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import torch

from catid2_ray.artifacts.manifest import Attempt, find
from catid2_ray.on_ray.training import checkpoints, worker
from catid2_ray.on_ray.training.checkpoints import State


def write(store, name: str, state: State, *, leave_out: tuple[str, ...] = (), cut: tuple[str, ...] = ()) -> None:
    """A checkpoint of two ranks, as its files come to lie in the store."""
    files = {"model.safetensors": b"weights", "optimiser-0.pt": b"first", "optimiser-1.pt": b"second", "export/a": b"a"}
    state.files = {file: len(data) for file, data in files.items()}
    files["state.json"] = json.dumps(asdict(state)).encode()
    for file, data in files.items():
        if file not in leave_out:
            store.write(f"runs/r/{name}/{file}", data[: 3 if file in cut else None])


def test_the_newest_whole_checkpoint_is_found_and_partial_ones_are_named(store, capfd):
    assert checkpoints.newest_whole(store, "runs/r") is None
    names = [checkpoints.new_name(steps) for steps in (9, 10, 10, 200, 3000)]
    write(store, names[0], State(epoch=1, step=3, sums={"loss": 0.1}, history=[{"loss": 1 / 3}], world=2, batch=8))
    write(store, names[1], State(epoch=2), leave_out=("state.json",))
    write(store, names[3], State(epoch=3), leave_out=("optimiser-1.pt",))
    write(store, names[4], State(epoch=4), cut=("optimiser-1.pt",))
    folder, state = checkpoints.newest_whole(store, "runs/r")
    assert folder == f"runs/r/{names[0]}"
    assert (state.epoch, state.step, state.sums, state.history) == (1, 3, {"loss": 0.1}, [{"loss": 1 / 3}])
    log = capfd.readouterr().err
    for reason in (
        "state.json is missing",
        "optimiser-1.pt has no bytes, expected 6",
        "optimiser-1.pt has 3 bytes, expected 6",
    ):
        assert f"reason='{reason}'" in log
    with checkpoints.opened(store, folder, state, ("optimiser-1", "export/")) as files:
        assert (files / "optimiser-1.pt").read_bytes() == b"second" and (files / "export" / "a").read_bytes() == b"a"


def test_what_is_left_of_a_training_says_whose_it_is_and_when_it_was_written(local_store, tmp_path):
    attempt = Attempt(local_store, "generator", settings={"a": 1}, parents={}, recipe={})
    torch.save({}, tmp_path / "optimiser-0.pt")
    checkpoints.seal(tmp_path, State(world=1), rank=0)
    local_store.upload(tmp_path, f"runs/{worker.run_name(attempt)}/{checkpoints.new_name(3)}")
    (name,) = local_store.names("runs")
    kind, _, key = name.rpartition("-")
    assert (kind, key) == ("generator", attempt.key)
    assert find(local_store, kind, key) is None
    _, state = checkpoints.newest_whole(local_store, f"runs/{name}")
    age = datetime.now(UTC) - datetime.fromisoformat(state.written)
    assert abs(age.total_seconds()) < 60
    attempt.commit([], metrics={})
    assert find(local_store, kind, key) is not None


def test_a_state_of_another_version_is_passed_over(local_store, capfd):
    local_store.write("runs/r/step-1/state.json", b'{"epochs_done": 3}')
    assert checkpoints.newest_whole(local_store, "runs/r") is None
    assert "of another version" in capfd.readouterr().err


def test_a_checkpoint_loads_whatever_gpu_its_rank_sat_on(tmp_path, monkeypatch):
    """torch writes the device's name with each tensor; here that of a second GPU, which this machine has not."""
    network = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        checkpoints.save(tmp_path, SimpleNamespace(module=network, optimizer=optimiser), rank=0)
    other = torch.nn.Linear(2, 2)
    fresh = torch.optim.AdamW(other.parameters())
    checkpoints.load(
        tmp_path, SimpleNamespace(module=other, optimizer=fresh), State(world=1, batch=4),
        rank=0, world=1, batch=4, whole_rows=True,
    )  # fmt: skip
    assert torch.equal(other.weight, network.weight)
    averages = zip(fresh.state_dict()["state"].values(), optimiser.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(loaded["exp_avg"], saved["exp_avg"]) for loaded, saved in averages)


def engine(numels: list[list[int]], world: int):
    """Stands in for ZeRO-1: its groups of parameters, and partitions padded to a multiple of two a rank."""
    groups = [[torch.zeros(size) for size in sizes] for sizes in numels]
    padded = [-(-sum(sizes) // (2 * world)) * 2 for sizes in numels]
    optimiser = SimpleNamespace(bit16_groups=groups, single_partition_of_fp32_groups=[torch.zeros(n) for n in padded])
    return SimpleNamespace(optimizer=optimiser)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3), (4, 3), (3, 5)])
def test_partitions_are_cut_anew_for_another_world(before, after):
    """Joined again, the new partitions are the parameters in their order, and zeros behind."""
    numels = [[3, 4], [1], [2, 2, 9]]
    totals = [sum(sizes) for sizes in numels]
    lengths = [part.numel() for part in engine(numels, before).optimizer.single_partition_of_fp32_groups]
    whole = [torch.arange(1.0, total + 1) for total in totals]
    padded = [torch.cat([values, torch.zeros(before * n - len(values))]) for values, n in zip(whole, lengths)]
    states = [
        {
            "base": {
                "state": {
                    group: {"step": torch.tensor(5.0), "exp_avg": 2 * flat[rank * n : (rank + 1) * n]}
                    for group, (flat, n) in enumerate(zip(padded, lengths))
                },
                "param_groups": ["as they are"],
            },
            "partitions": [flat[rank * n : (rank + 1) * n] for flat, n in zip(padded, lengths)],
        }
        for rank in range(before)
    ]
    cut = [checkpoints._cut_anew(states, engine(numels, after), rank=rank, world=after) for rank in range(after)]
    for group, values in enumerate(whole):
        found = torch.cat([state["partitions"][group] for state in cut])
        averages = torch.cat([state["base"]["state"][group]["exp_avg"] for state in cut])
        assert torch.equal(found[: len(values)], values) and not found[len(values) :].any()
        assert torch.equal(averages, 2 * found)
        assert all(state["base"]["state"][group]["step"] == 5 for state in cut)
