"""Figures of a training reach TensorBoard's files and the bar's note."""

from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.training import meter
from catid2_ray.on_ray.training.meter import Meter


def test_the_bar_and_the_event_files_get_every_figure(tmp_path, monkeypatch):
    notes, clock = [], iter([100.0, 102.0, 102.0, 103.0, 103.0])
    monkeypatch.setattr(progress, "reporter", lambda: lambda *report: notes.append(report))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    one = Meter(tmp_path, stage="generator", steps_done=0)
    one.count(300)
    one.count(100)
    figures = one.show(2, 0, 1.5, 1e-3)
    assert figures == {"loss": 1.5, "learning_rate": 1e-3, "examples_per_second": 200.0}
    one.score(2, {"score": 0.25, "recall@10": 0.125, "worst": ["a query"]})
    one.count(10)
    one.show(3, 0, 1.25, 1e-3)
    one.checkpointed(3, 1)
    one.close()
    assert notes == [
        (2, "epoch 1 loss 1.500 lr 1.0e-03 200/s"),
        (3, "epoch 1 loss 1.250 lr 1.0e-03 10/s score 0.2500"),
        (3, "epoch 1 loss 1.250 lr 1.0e-03 10/s score 0.2500", 1),
    ]
    (events,) = tmp_path.iterdir()
    written = events.read_bytes()
    for tag in (
        b"training/loss",
        b"training/learning_rate",
        b"training/examples_per_second",
        b"training/score",
    ):
        assert tag in written
    assert b"validation/recall_10" in written and b"worst" not in written
