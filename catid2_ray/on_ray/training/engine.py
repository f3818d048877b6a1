"""DeepSpeed around a module, and the collectives that the training loop needs: the one place that imports deepspeed."""

import contextlib
import os

import torch
import torch.distributed as dist

from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.task import Batches, Run


class Gather(torch.autograd.Function):
    """Rows of all ranks along dim 0; the backward pass sums the gradient of a rank's rows over all ranks."""

    @staticmethod
    def forward(ctx, rows):
        ctx.rows = rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient):
        # Of its own memory: autograd may hand the same tensor to others, who must not see the sum.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows : (dist.get_rank() + 1) * ctx.rows]


def start_engine(run: Run, module: torch.nn.Module, batches: Batches):
    """The DeepSpeed engine with AdamW; RecipeError where activations are to be checkpointed and the model cannot."""
    import deepspeed

    # The shared-memory op would be compiled with g++ on first use; plain gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = run.settings
    if getattr(settings, "activation_checkpointing", False):
        _checkpoint_activations(module)
    groups = run.task.parameter_groups(module, weight_decay=settings.weight_decay)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(groups, lr=settings.learning_rate),
            dist_init_required=False,
            config={
                "train_batch_size": batches.plan.batch,
                "train_micro_batch_size_per_gpu": batches.micro,
                "gradient_accumulation_steps": batches.accumulation,
                "gradient_clipping": settings.clip,
                "zero_optimization": {
                    "stage": settings.zero_stage,
                    "reduce_bucket_size": 20_000_000,
                    "allgather_bucket_size": 20_000_000,
                },
                "bf16": {"enabled": settings.precision == "bf16"},
                "steps_per_print": 10**9,
                "zero_allow_untested_optimizer": True,
            },
        )
    return engine


@contextlib.contextmanager
def _without_compiler():
    """DeepSpeed imports an optimizer that nobody asked for and that is compiled; torch would import its whole compiler for it:
    more than a second and 45 MB in every worker."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _checkpoint_activations(module: torch.nn.Module) -> None:
    """Through the models' own switch; of models inside models the outermost, which reaches those below."""
    reached: set[int] = set()
    for part in module.modules():
        offers = getattr(part, "supports_gradient_checkpointing", hasattr(part, "gradient_checkpointing_enable"))
        if offers and id(part) not in reached:
            switch = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            switch()
            reached |= {id(below) for below in part.modules()}
    if not reached:
        raise RecipeError(
            f"generator.activation_checkpointing: {type(module).__name__} holds no model that offers it "
            "(gradient_checkpointing_enable): set it to false, or lower generator.micro_batch to save memory"
        )


def share_weights(module: torch.nn.Module, world: int) -> None:
    """All ranks get rank 0's parameters and buffers: what is computed in place need not round alike everywhere."""
    if world > 1:
        for _, tensor in checkpoints.tensors(module):
            dist.broadcast(tensor.detach(), src=0)


def share_objects(values: list, world: int, device: str) -> list:
    """Rank 0's values on all ranks; the others hand in anything of the same length."""
    if world > 1:
        dist.broadcast_object_list(values, src=0, device=torch.device(device))
    return values


def mean_over_ranks(values: list[float], world: int, device: str) -> list[float]:
    """In float64, the same on all ranks."""
    if world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return (shared / world).tolist()
