"""Figures of a training reach TensorBoard's files and the bar's note; the peak is a table's or measured."""

import pytest

from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.training import meter
from catid2_ray.on_ray.training.meter import Meter, peak_flops


def test_the_bar_and_the_event_files_get_every_figure(tmp_path, monkeypatch):
    notes, clock = [], iter([100.0, 102.0, 102.0, 103.0, 103.0])
    monkeypatch.setattr(progress, "reporter", lambda: lambda *report: notes.append(report))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    one = Meter(tmp_path, stage="generator", steps_done=0, flops=50.0, peak=1e4, workers=2)
    one.count(300)
    one.count(100)
    figures = one.show(2, 0, 1.5, 1e-3)
    # 400 rows of 50 FLOPs in two seconds, on two workers of 10,000 FLOP/s.
    assert figures == {"loss": 1.5, "learning_rate": 1e-3, "examples_per_second": 200.0, "mfu": 0.5}
    one.score(2, {"score": 0.25, "recall@10": 0.125, "worst": ["a query"]})
    one.count(10)
    one.show(3, 0, 1.25, 1e-3)
    one.checkpointed(3, 1)
    one.close()
    assert notes == [
        (2, "epoch 1 loss 1.500 lr 1.0e-03 200/s mfu 50.0%"),
        (3, "epoch 1 loss 1.250 lr 1.0e-03 10/s mfu 2.5% score 0.2500"),
        (3, "epoch 1 loss 1.250 lr 1.0e-03 10/s mfu 2.5% score 0.2500", 1),
    ]
    (events,) = tmp_path.iterdir()
    written = events.read_bytes()
    for tag in (
        b"training/loss",
        b"training/learning_rate",
        b"training/examples_per_second",
        b"training/mfu",
        b"training/score",
    ):
        assert tag in written
    assert b"validation/recall_10" in written and b"worst" not in written


def test_the_peak_is_measured_on_a_cpu_and_read_from_a_table_for_known_gpus(monkeypatch):
    flops, source = peak_flops("cpu", "bf16")
    assert 1e8 < flops < 1e14 and source == "matmul_1024_float32"
    for name, bf16, fp32 in (("NVIDIA H100 PCIe", 756e12, 51e12), ("NVIDIA H100 80GB HBM3", 989e12, 67e12)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert [peak_flops("cuda", precision)[0] for precision in ("bf16", "fp32")] == [bf16, fp32]
        assert peak_flops("cuda:0", "bf16")[1].startswith("data_sheet_of_H100")


@pytest.mark.parametrize("device", ["NVIDIA L40S", "NVIDIA L4"])
def test_names_that_begin_alike_are_told_apart(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert peak_flops("cuda", "fp32")[1] == f"data_sheet_of_{device.split()[1]}"
