"""What a machine has too little of (disk, memory, room for Ray's objects) or lost (a worker, a node, the head): Ray's errors and
the system's as one of ours, which names the setting to change, or where to look.
"""

import errno

import ray.exceptions
import torch

from catid2_ray.errors import CatidError, MachineError

_DISK = (
    "free some, or set the folder that is full to a larger disk: CATID2_CACHE for fetched artefacts, TMPDIR for what a stage lays "
    "out, --temp-dir of `ray start` for what Ray spills"
)
_OBJECTS = (
    "raise cluster.object_store_mb (for a Ray of the job's own) or --object-store-memory of `ray start`, or lower "
    "catalog.rows_per_part"
)
# Ray starts a lost worker's task anew some times, on another node if need be, before it gives one of these to the job.
_LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RpcError,
)
# Of a stage: what makes its workers smaller, or fewer of them at once on a node.
_MEMORY = {
    "catalog": "catalog.rows_per_part or catalog.workers",
    "pairs": "catalog.rows_per_part or catalog.workers",
    "tuned_encoder": "tuning.batch or tuning.products",
    "embeddings": "embedding.batch, embedding.workers or catalog.rows_per_part",
    "adapter": "adapter.batch or adapter.pairs",
    "quantizer": "quantizer.batch or quantizer.workers",
    "ids": "ids.workers, ids.bucket_rows or catalog.rows_per_part",
    "generator": "generator.micro_batch, or set generator.activation_checkpointing or a higher generator.zero_stage",
    "aligned": "alignment.batch or alignment.group",
    "serving": "ids.workers or catalog.rows_per_part",
    "mixture": "evaluation.workers or evaluation.beam_width",
    "evaluation": "evaluation.workers or evaluation.beam_width",
}


def named(error: BaseException, stage: str) -> CatidError | None:
    """The error of ours for a lack or a loss among the causes of an error that no code of ours raised; None for another."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, CatidError):
            return None
        seen.add(id(error))
        if found := _named(error, stage):
            return found
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _named(error: BaseException, stage: str) -> CatidError | None:
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ray.exceptions.OutOfDiskError) or getattr(error, "errno", None) in (
        errno.ENOSPC,
        errno.EDQUOT,
    ):
        return MachineError(f"{stage}: a disk is full ({text}): {_DISK}. Then rerun to go on")
    if isinstance(error, ray.exceptions.ObjectStoreFullError):
        return MachineError(f"{stage}: Ray's object store is full ({text}): {_OBJECTS}. Then rerun to go on")
    if isinstance(error, torch.OutOfMemoryError | ray.exceptions.OutOfMemoryError | MemoryError):
        smaller = _MEMORY.get(stage, "catalog.rows_per_part or the stage's workers")
        return MachineError(
            f"{stage}: a worker ran out of memory ({text}): lower {smaller}, or take larger machines. Then rerun to go on"
        )
    if isinstance(error, _LOST):
        return MachineError(
            f"{stage}: Ray lost workers or nodes and could not go on without them ({text}): `ray status` and the dashboard say "
            "which nodes are there, `ray logs` why a process died. Rerun to go on"
        )
    return None
