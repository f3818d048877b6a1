"""What a ranking cost, and on which machine: seconds to make it, milliseconds and bytes of a query."""

import os
import platform
from collections.abc import Mapping

import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.evaluation.reproduce.conditions import Condition


def cost_of(train: float, index: float, milliseconds: float, read: int) -> dict:
    """Seconds to train and to index, milliseconds a query, bytes that a query may read."""
    return {"train_seconds": round(train, 2), "index_seconds": round(index, 2), "ms_per_query": round(milliseconds, 3),
            "bytes": int(read)}  # fmt: skip


def fine_tunes(condition: Condition) -> bool:
    """Whether it has an encoder of its own, fine-tuned from the one that was published (DPR)."""
    return bool(condition.settings.get("dpr")) or condition.settings.get("dense") == "dpr"


def adapts(condition: Condition) -> bool:
    """Whether its vectors are those of the adapter."""
    settings = condition.settings
    return condition.family == "ids" or bool(settings.get("adapted")) or settings.get("dense") == "adapted"


def with_shared(condition: Condition, cost: dict, parts: Mapping[str, Manifest]) -> dict:
    """The cost with what methods share, counted for each: the tuning of the encoder and, for IDs, embeddings and the adapter. Of a
    release: with its examples. `parts`: by role, of which the ranking was made."""
    seconds = {name: part.metrics["seconds"] for name, part in parts.items() if "seconds" in part.metrics}
    training, indexing = cost["train_seconds"], cost["index_seconds"]
    if not fine_tunes(condition):
        training += seconds.get("tuned_encoder", 0.0)
    if condition.family in ("release", "generator"):
        read = [parts[name].files for name in _read_by(condition) if name in parts]
        cost = cost | {"bytes": sum(e["bytes"] for files in [*read, parts["ids"].named("trie/")] for e in files)}
    if condition.family == "release":
        training += seconds["examples"]
        cost = cost | {"ids_seconds": seconds["quantizer"] + seconds["ids"],
                       "generator_seconds": seconds["examples"] + seconds["generator"]}  # fmt: skip
    if condition.family in ("ids", "generator"):
        training, indexing = training + seconds.get("adapter", 0.0), indexing + seconds["embeddings"]
    return cost | {"train_seconds": training, "index_seconds": indexing}


def _read_by(condition: Condition) -> tuple[str, ...]:
    """The parts that a replica of it reads, beside the trie."""
    if condition.settings.get("ahead"):
        return "generator", "node_vectors"
    return ("generator", "serving", "node_vectors") if condition.settings.get("served") else ("generator",)


def machine() -> str:
    """The processor, its threads, memory and GPUs, for whoever reads the costs."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    has = [name, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *gpus, f"{torch.get_num_threads()} threads in use"]
    return ", ".join(has)
