"""A linear layer with 8-bit weights for CPUs, in place of a float one: a quarter of the bytes, and integer products.

Weights have one scale per output (largest entry / 127), inputs one scale per row, taken when they come; sums are exact
32-bit integers, so an answer does not depend on which other rows are in the batch (one scale per batch would make it
so). The product is oneDNN's, which uses VNNI or AMX where the CPU has them, if inputs are unsigned, with 128 as their zero
point: signed ones sent it to its reference code on a CPU with VNNI and without AMX, a thousand times slower. On other
CPUs it adds pairs of products in 16 bits, which 255 × 127 overflows: errors of up to 40 % were measured. There weights
have 7 bits (largest entry / 63).

R rows, I inputs, O outputs.
"""

import copy
from functools import cache

import torch
from torch import Tensor, nn

from catid2_ray.errors import InputError

# Rows at a time: a wide batch's inputs are quantised while they lie in the cache, not written out and read again.
_ROWS = 256
# Fewer rows than this send oneDNN to its reference code where inputs × outputs is small: 2 ms instead of 0.03 ms for
# one row of 256 × 256.
_FEWEST = 8
_ZERO = 128  # of unsigned inputs


class Int8Linear(nn.Module):
    """y = x Wᵀ with W (float O×I, on CPU, taken at once) and x in 8 bits; x …×I of any float type, y of the same."""

    # Code of transformers asks a linear layer for the type of its weight; there is no float weight here.
    weight = None

    def __init__(self, weight_OI: Tensor):
        super().__init__()
        if weight_OI.device.type != "cpu":
            raise InputError(f"int8 weights are for CPUs, found a model on {weight_OI.device}; use weights='float32'")
        if not _has_onednn():
            raise InputError("int8 weights need a torch built with oneDNN, and this one is not; use weights='float32'")
        weight_OI = weight_OI.detach().float()
        if not weight_OI.isfinite().all():
            raise InputError("the model's weights hold NaN or infinity and cannot be made int8; the model is damaged")
        self.scale_O, codes_OI = _quantize(weight_OI, steps=weight_steps())
        self.scale_O = self.scale_O[:, 0].contiguous()
        self.zero_O = torch.zeros(len(weight_OI), dtype=torch.int32)
        self.codes = torch.ops.onednn.qlinear_prepack(codes_OI, [_ROWS, weight_OI.shape[1]])

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x_RI = x.reshape(-1, x.shape[-1])
        y_RO = x_RI.new_empty(len(x_RI), len(self.scale_O))
        for part_RI, out_RO in zip(x_RI.split(_ROWS), y_RO.split(_ROWS)):
            self._rows(part_RI, out_RO)
        return y_RO.view(*x.shape[:-1], y_RO.shape[1])

    def _rows(self, x_RI: Tensor, out_RO: Tensor) -> None:
        scale_R1, codes_RI = _quantize(x_RI.float())
        rows = len(codes_RI)
        if rows < _FEWEST:
            codes_RI = nn.functional.pad(codes_RI, (0, 0, 0, _FEWEST - rows))
        y_RO = _product(codes_RI, self.codes, self.scale_O, self.zero_O)
        torch.mul(y_RO[:rows], scale_R1, out=out_RO)


def int8_copy(module: nn.Module) -> nn.Module:
    """`module` with every linear layer without bias replaced by its Int8Linear; other parameters are shared, not
    copied. Raises InputError for weights that are not on a CPU or not finite."""
    twin = copy.deepcopy(module, memo={id(parameter): parameter for parameter in module.parameters()})
    for name, part in list(twin.named_modules()):
        if isinstance(part, nn.Linear) and part.bias is None:
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, Int8Linear(part.weight))
    return twin


@cache
def weight_steps() -> int:
    """The largest weight code whose sums are exact on this CPU, found by a product of the largest codes: 127 or 63."""
    codes, one = torch.full((_ROWS, 64), 127, dtype=torch.int8), torch.ones(64)
    packed = torch.ops.onednn.qlinear_prepack(codes[:64], [_ROWS, 64])
    product = _product(codes, packed, one, torch.zeros(64, dtype=torch.int32))
    return 127 if bool((product == 64 * 127 * 127).all()) else 63


def _product(codes_RI: Tensor, packed, scale_O: Tensor, zero_O: Tensor) -> Tensor:
    """float32 R×O: int8 inputs times the packed weights, times their scales."""
    unsigned_RI = codes_RI.view(torch.uint8).bitwise_xor(_ZERO)  # of two's complement: + 128
    return torch.ops.onednn.qlinear_pointwise(
        unsigned_RI, 1.0, _ZERO, packed, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _quantize(rows: Tensor, *, steps: int = 127) -> tuple[Tensor, Tensor]:
    """(scale of each row, rows / scale rounded to −steps … steps); a row with NaN or infinity gets a scale that is too."""
    # Two reductions read the rows twice; an array of absolute values would be written and read again.
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    scale = largest.div_(steps).clamp_min_(1e-30)
    return scale, (rows / scale).round_().to(torch.int8)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
