"""Two linear maps that let queries and products meet before anything is quantised: V on products' vectors, W on queries'.

Both begin as the identity, are pulled towards it, and are learned from training pairs by an in-batch softmax. What an epoch
is worth is its recall on queries kept back, the identity being epoch 0: an adapter that lowers it is never adopted. Not of
the CAT-ID² paper, whose IDs are made of products alone; CQ-SID (arXiv 2605.14434) has a query–item term inside the quantizer.

Shape letters: B rows of a batch, N rows, M rows of all ranks, D embedding, Q queries, P relevant pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.quantizer.contrast import Gather, gathered, global_mean, unit_rows
from catid2_ray.schedule import learning_rate_at, seed_from

FILE = "adapter.safetensors"
SCALE = 20.0  # of the cosines in the softmax
PULL = 1e-2  # weight of ‖W − I‖² + ‖V − I‖²
KS = (10, 50, 100)
CUT = 50  # the recall that epochs are judged by
_BLOCK = 1024  # rows of one product, whatever is asked for: a row's bits do not depend on the rows beside it
_SCORED = 256  # queries scored at a time
_NOWHERE = np.iinfo(np.int64).max  # in place of how many products come before one that is not found


class LinearAdapter(nn.Module):
    """`product_DD` is V, `query_DD` is W; a vector d becomes V d / ‖V d‖."""

    def __init__(self, width: int):
        super().__init__()
        self.product_DD = nn.Parameter(torch.eye(width))
        self.query_DD = nn.Parameter(torch.eye(width))

    @property
    def width(self) -> int:
        return len(self.product_DD)

    def forward(self, query_BD: Tensor, product_BD: Tensor) -> tuple[Tensor, Tensor]:
        """W q and V d, rows of length 1; with gradient."""
        return unit_rows(query_BD @ self.query_DD.T), unit_rows(product_BD @ self.product_DD.T)

    def products(self, vector_ND) -> np.ndarray:
        """float32 N×D: V d, rows of length 1 (rows of zeros stay zeros). InputError for another width."""
        return self._applied(self.product_DD, vector_ND)

    def queries(self, vector_ND) -> np.ndarray:
        """float32 N×D: W q, rows of length 1. InputError for another width."""
        return self._applied(self.query_DD, vector_ND)

    @torch.no_grad()
    def _applied(self, matrix_DD: Tensor, vector_ND) -> np.ndarray:
        vector_ND = torch.from_numpy(np.array(vector_ND, np.float32))
        if vector_ND.ndim != 2 or vector_ND.shape[1] != self.width:
            raise InputError(
                f"the adapter reads vectors N×{self.width}, found {tuple(vector_ND.shape)}: use the encoder that it was trained on"
            )
        matrix_DD, out_ND = matrix_DD.detach().float().cpu(), torch.empty_like(vector_ND)
        for start in range(0, len(vector_ND), _BLOCK):
            rows_BD = vector_ND[start : start + _BLOCK]
            padded_BD = nn.functional.pad(rows_BD, (0, 0, 0, _BLOCK - len(rows_BD)))
            out_ND[start : start + _BLOCK] = unit_rows(padded_BD @ matrix_DD.T)[: len(rows_BD)]
        return out_ND.numpy()

    def save(self, folder) -> None:
        """Writes adapter.safetensors into a folder, which is made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        matrices = {name: matrix.detach().float().cpu().contiguous() for name, matrix in self.named_parameters()}
        save_file(matrices, Path(folder) / FILE)

    @classmethod
    def load(cls, folder) -> "LinearAdapter":
        """The inverse of `save`. Raises ArtifactError when the file is missing or damaged."""
        path = Path(folder) / FILE
        try:
            matrices = load_file(path)
            adapter = cls(len(matrices["product_DD"]))
            adapter.load_state_dict(matrices)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ArtifactError(f"{path} holds no adapter ({error}); run `catid2 reindex --refresh-adapter`") from error
        return adapter.eval()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity."""
        for matrix_DD in self.parameters():
            matrix_DD.copy_(torch.eye(self.width))


def adapter_loss(
    adapter, query_BD: Tensor, product_BD: Tensor, query_B: Tensor, product_B: Tensor, *, gather: Gather | None = None
) -> Tensor:
    """−mean_i log( exp(20⟨Wq_i, Vd_i⟩) / Σ_j exp(20⟨Wq_i, Vd_j⟩) ) + 10⁻² (‖W − I‖² + ‖V − I‖²), cosine, over the global batch.

    j runs over i itself and all rows of another query *and* another product: another product of the same query is a false
    negative, the same product under another query is the positive once more. `query_B`, `product_B`: int64, which is which.
    Mean over the rows of all ranks, so that it does not depend on their number; ‖·‖² sums over the matrix. `adapter`: plain, or
    wrapped (DeepSpeed). `gather`: see `losses`.
    """
    unit_query_BD, unit_product_BD = adapter(query_BD, product_BD)
    key_MD, query_M, product_M = (gathered(rows, gather) for rows in (unit_product_BD, query_B, product_B))
    alike_BM = (query_B[:, None] == query_M) | (product_B[:, None] == product_M)
    other_BM = (SCALE * unit_query_BD @ key_MD.T).masked_fill(alike_BM, -torch.inf)
    # A row's own pair is masked with its like and stands beside them, so that no rank needs to know its number.
    own_B1 = SCALE * (unit_query_BD * unit_product_BD).sum(1, keepdim=True)
    total = (torch.cat([own_B1, other_BM], 1).logsumexp(1) - own_B1[:, 0]).sum()
    plain = getattr(adapter, "module", adapter)
    distance = sum((matrix - torch.eye(len(matrix)).to(matrix)).square().sum() for matrix in plain.parameters())
    return global_mean(total, len(query_BD), gather).mean + PULL * distance


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Queries kept back and the products that they are searched among.

    `query_QD`, `product_ND`: float32, as the encoder made them; relevant pair p is of query `query_P[p]` and product
    `product_P[p]`, int64 places in them. Every query has one.
    """

    query_QD: np.ndarray
    product_ND: np.ndarray
    query_P: np.ndarray
    product_P: np.ndarray

    def recall(self, adapter: LinearAdapter | None, cuts: Sequence[int] = KS) -> dict[str, float]:
        """By cut, the share of a query's relevant products among its nearest by cosine, averaged over queries; without an
        adapter, of the vectors as they are. A product that ties with a relevant one is not before it; an adapter
        whose numbers are not finite finds nothing."""
        product_ND, query_QD = (unit_rows(torch.from_numpy(rows)).numpy() for rows in (self.product_ND, self.query_QD))
        if adapter is not None:
            product_ND, query_QD = adapter.products(product_ND), adapter.queries(query_QD)
        product_ND, query_QD = torch.from_numpy(product_ND), torch.from_numpy(query_QD)
        before_P = np.empty(len(self.query_P), np.int64)
        for start in range(0, len(query_QD), _SCORED):
            score_QN = query_QD[start : start + _SCORED] @ product_ND.T
            for p in np.flatnonzero((self.query_P >= start) & (self.query_P < start + _SCORED)):
                score_N = score_QN[self.query_P[p] - start]
                own = score_N[self.product_P[p]]
                # Nothing is more than NaN, so such a product would come first.
                before_P[p] = int((score_N > own).sum()) if own.isfinite() else _NOWHERE
        wanted_Q = np.bincount(self.query_P, minlength=len(query_QD))
        return {
            str(cut): float(
                (np.bincount(self.query_P, weights=before_P < cut, minlength=len(query_QD)) / wanted_Q).mean()
            )
            for cut in cuts
        }


def fit(
    query_ND: Tensor, product_ND: Tensor, query_N: Tensor, product_N: Tensor, *, recall: Callable[[LinearAdapter], float],
    epochs: int = 6, batch: int = 512, learning_rate: float = 3e-4, seed: int = 0, adapter: LinearAdapter | None = None,
) -> tuple[LinearAdapter, list[dict]]:  # fmt: skip
    """An adapter trained in one process on N pairs, and a record an epoch: mean `loss`, `score`.

    `query_N`, `product_N`: int64, as in `adapter_loss`. `recall`: what an adapter is worth; that of the best epoch is returned,
    the start being epoch 0 and winning ties. `adapter`: where to start, the identity by default; it is trained in place, but for
    a matrix that asks for no gradient. AdamW without decay, 5 % warm-up, cosine; the last batch of an epoch is filled
    from its beginning. InputError where there are no pairs.
    """
    if not len(query_ND):
        raise InputError("an adapter learns from pairs of query and product, found none")
    adapter = adapter or LinearAdapter(query_ND.shape[1])
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.0)
    batch = min(batch, len(query_ND))
    steps, history = -(-len(query_ND) // batch), [{"epoch": 0, "score": recall(adapter)}]
    best = {name: matrix.clone() for name, matrix in adapter.state_dict().items()}
    for epoch in range(epochs):
        order = torch.from_numpy(pair_order(len(query_ND), seed=seed, epoch=epoch))
        total = 0.0
        for step in range(steps):
            at_B = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(
                    epoch * steps + step, epochs * steps, peak=learning_rate, warmup_share=0.05
                )
            loss = adapter_loss(adapter, query_ND[at_B], product_ND[at_B], query_N[at_B], product_N[at_B])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimiser.step()
            total += float(loss.detach()) / steps
        score = recall(adapter)
        if score > max(record["score"] for record in history):
            best = {name: matrix.clone() for name, matrix in adapter.state_dict().items()}
        history.append({"epoch": epoch + 1, "loss": total, "score": score})
    adapter.load_state_dict(best)
    return adapter.eval(), history


def pair_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 permutation of 0 … rows − 1, a pure function of its arguments."""
    return np.random.default_rng(seed_from(seed, epoch)).permutation(rows)
