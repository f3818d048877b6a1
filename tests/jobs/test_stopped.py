"""A person stops a job: one Ctrl-C, or SIGTERM, in a stage after a training and in a training; the same command goes on."""

import re
import signal

import pytest

from catid2_ray.artifacts.store import Store
from tests.command import run_and_signal, run_until, write_recipe

# Three jobs: part of `make test-all` and `make test-faults`.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults]
WITHIN_S = 20  # 10 s are promised; tests share the machine with others


def test_one_signal_ends_a_job_in_every_stage_and_the_same_command_goes_on(tiny, tmp_path, fault):
    tiny["generator"] |= {"epochs": 40}
    job = ["catid2_ray.cli", "reindex", "--recipe", write_recipe(tmp_path, tiny | {"store": str(tmp_path / "store")})]
    store = Store(tmp_path / "store")

    shown, code, seconds = run_and_signal("event=start stage=ids", signal.SIGINT, *job)
    assert code == 130 and seconds < WITHIN_S, (code, seconds, shown[-2000:])
    assert "Traceback" not in shown and "event=commit stage=ids" not in shown
    told = re.search(r"Interrupted: ended by SIGINT. Committed in (.*): (.*)\. The same command goes on", shown)
    assert told[1] == store.uri
    stages = dict(stage.split(" ") for stage in told[2].split(", "))
    assert [*stages] == ["catalog", "pairs", "embeddings", "quantizer"]
    assert all(store.exists(f"artifacts/{kind}/{key}/manifest.json") for kind, key in stages.items())

    shown, code, seconds = run_and_signal(
        "event=checkpoint stage=training_the_generator epochs_done=", signal.SIGTERM, *job
    )
    assert code == 143 and seconds < WITHIN_S, (code, seconds, shown[-2000:])
    assert "Interrupted: ended by SIGTERM" in shown and "Traceback" not in shown
    # The IDs were made by this second run.
    assert shown.count("event=reuse") == 4 and not store.exists("current")

    resumed = run_until("event=resume stage=training_the_generator", *job)[-1]
    words = dict(word.split("=", 1) for word in resumed.split())
    fault(
        "SIGINT in a stage, SIGTERM in a training", times=2, outcome="ended in time; the same command goes on", lost_s=0
    )
    assert int(words["epochs_done"]) >= 1 and words["checkpoint"].startswith(f"{store.uri}/runs/generator-")
