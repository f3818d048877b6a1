"""A text encoder fine-tuned so that a query lies near what it asks for, in-batch and BM25 negatives (Karpukhin et al. 2020, DPR).

One encoder for queries and products, as sentence encoders are tuned, where DPR has two; a short loop in one process, AdamW, linear
warm-up over 5 % and cosine. Dropout stays off: what a seed decides is the order, the sample and the negatives. The stage
`tuned_encoder` and the baseline DPR of `catid2 reproduce` both train here.

B pairs of a batch, M products that they are compared with, D embedding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.errors import InputError
from catid2_ray.schedule import learning_rate_at, seed_from

SCALE = 20.0  # of the cosines in the softmax, as sentence-transformers has it
NEGATIVES_FROM = 30  # first products by BM25, among which a hard negative is drawn
WEIGHT_DECAY = 1e-2


class Taught(NamedTuple):
    """A training pair: texts, and a product that BM25 finds for the query and nobody judged relevant (None: it finds none)."""

    query: str
    product: str
    negative: str | None


def pairs_with_negatives(
    pairs: Sequence[tuple[str, int]], texts: Sequence[str], found: Callable[[str], Sequence[int]], *, seed: int,
    most: int | None = None,
) -> list[Taught]:  # fmt: skip
    """`pairs`: query and row of a relevant product; `found`: query → rows of the first products by BM25, best first.

    Of more than `most` pairs a seeded sample. A negative is drawn among the first NEGATIVES_FROM that no pair calls relevant.
    """
    relevant: dict[str, set[int]] = {}
    for query, row in pairs:
        relevant.setdefault(query, set()).add(row)
    rng = np.random.default_rng(seed_from(seed, 0))
    order = rng.permutation(len(pairs))[: most or len(pairs)]
    candidates: dict[str, list[int]] = {}
    taught = []
    for place in np.sort(order):
        query, row = pairs[place]
        if query not in candidates:
            candidates[query] = [other for other in found(query)[:NEGATIVES_FROM] if other not in relevant[query]]
        others = candidates[query]
        negative = texts[others[rng.integers(len(others))]] if others else None
        taught.append(Taught(query, texts[row], negative))
    return taught


def tuning_loss(encoder: HuggingFaceEncoder, batch: Sequence[Taught]) -> torch.Tensor:
    """−mean_i log( exp(20⟨q_i, d_i⟩) / Σ_j exp(20⟨q_i, d_j⟩) ), d_j the batch's products and its hard negatives, but for
    products that the batch names as relevant to the same query. DPR's equation 2 with cosines; mean over the batch."""
    queries, products = [pair.query for pair in batch], [pair.product for pair in batch]
    keys = products + [pair.negative for pair in batch if pair.negative is not None]
    query_BD, key_MD = encoder.with_gradient([*queries, *keys]).split([len(queries), len(keys)])
    score_BM = SCALE * query_BD @ key_MD.T
    asked = {(pair.query, pair.product) for pair in batch}
    others = torch.tensor(
        [
            [place != own and (query, text) in asked for place, text in enumerate(keys)]
            for own, query in enumerate(queries)
        ]
    )
    score_BM = score_BM.masked_fill(others.to(score_BM.device), -torch.inf)
    return torch.nn.functional.cross_entropy(score_BM, torch.arange(len(batch), device=score_BM.device))


def fine_tune(
    encoder: HuggingFaceEncoder, taught: Sequence[Taught], *, epochs: int, batch: int, learning_rate: float, seed: int,
    score: Callable[[], float] | None = None, say: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[dict]:  # fmt: skip
    """Train the encoder in place; returns a record an epoch: its number from 1, mean `loss`, and `score` where there is one.

    `score`: what the encoder is worth as it is now. It is asked before the first epoch, which makes record 0, and after each; the
    encoder is left as the best epoch had it, the earliest of equals, so that one that gains nothing stays untouched. Without it
    the last epoch stays. The last batch of an epoch is filled from its beginning. `say`: after each step, how many of how many,
    and the loss. InputError where there are no pairs.
    """
    if not taught:
        raise InputError("an encoder is tuned by pairs of query and product, found none")
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    batch = min(batch, len(taught))
    steps, history, best = -(-len(taught) // batch), [], None
    if score is not None:
        history, best = [{"epoch": 0, "score": score()}], _weights(encoder)
    for epoch in range(epochs):
        order = np.random.default_rng(seed_from(seed, epoch + 1)).permutation(len(taught))
        total = 0.0
        for step in range(steps):
            at = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
            rate = learning_rate_at(epoch * steps + step, epochs * steps, peak=learning_rate, warmup_share=0.05)
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = tuning_loss(encoder, [taught[i] for i in at])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(encoder.parameters()), 1.0)
            optimiser.step()
            total += float(loss.detach()) / steps
            say(epoch * steps + step + 1, epochs * steps, float(loss.detach()))
        record = {"epoch": epoch + 1, "loss": total}
        if score is not None:
            record["score"] = score()
            if record["score"] > max(earlier["score"] for earlier in history):
                best = _weights(encoder)
        history.append(record)
    if best is not None:
        with torch.no_grad():
            for weights, kept in zip(encoder.parameters(), best):
                weights.copy_(kept)
    return history


def _weights(encoder: HuggingFaceEncoder) -> list[torch.Tensor]:
    return [weights.detach().clone() for weights in encoder.parameters()]
