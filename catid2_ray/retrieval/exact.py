"""Exact scores of every node of the trie, and the beam of any width that follows from them without another decoder step.

One unpruned pass, depth first and in blocks of nodes: memory holds one block's cache per level, however large the trie.
It costs `decoder_rows(trie)` decoder rows a query where a beam of 100 costs about 300, so it is for finding out, not for
serving. What a search leaves out is then a matter of numbers that are known already.

B queries, M nodes of a block, C children of a block, L levels searched, n_l nodes of depth l, N trie rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.decoders import Decoder, checked_queries, decoder_for
from catid2_ray.retrieval.trie import Trie

_ROWS = 1024  # decoder rows of a block


def decoder_rows(trie: Trie, levels: int | None = None) -> int:
    """How many decoder rows an unpruned pass costs a query: the nodes of all depths but the last, whose codes end the ID."""
    return sum(trie.nodes(level) for level in range(levels or trie.levels))


@torch.inference_mode()
def exact_scores(
    model, trie: Trie, input_ids, attention_mask, *, levels: int | None = None, normalize: str = "level", memory=None,
    rows: int = _ROWS,
) -> list[np.ndarray]:  # fmt: skip
    """Natural log of P(prefix | query) of every prefix that an ID has: per depth 1 … L float32 B×n_l, nodes in ID order.

    Arguments as `constrained_beam_search`; `rows`: decoder rows of a block, queries × nodes. The last depth holds every ID
    where all levels are searched. Memory: the result, and per level one block's cache. Raises InputError for a model that
    does not fit the trie, queries that it cannot read, and logits that are not finite.
    """
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    ids_BT, mask_BT = checked_queries(input_ids, attention_mask, decoder)
    memory = decoder.encode(ids_BT, mask_BT) if memory is None else memory
    levels, width = levels or trie.levels, max(1, rows // len(ids_BT))
    score_L = [np.empty((len(ids_BT), trie.nodes(level + 1)), np.float32) for level in range(levels)]
    root_1 = np.zeros(1, np.int64)
    blocks = [_Block(0, root_1, root_1, root_1, torch.zeros(len(ids_BT), 1, device=decoder.device), None)]
    while blocks:
        block = blocks.pop()
        child_C, below = _scored(block, decoder, trie, memory, normalize)
        score_L[block.level][:, child_C] = below.logp_BM.cpu().numpy()
        if below.level < levels:
            blocks += below.split(width)
    return score_L


class _Block(NamedTuple):
    """Nodes of one depth side by side: each one's place among the nodes of the block before, its code and log P."""

    level: int
    node_M: np.ndarray
    parent_M: np.ndarray
    code_M: np.ndarray
    logp_BM: Tensor
    cache: object  # of the block before

    def split(self, width: int) -> list["_Block"]:
        parts = [slice(start, start + width) for start in range(0, len(self.node_M), width)]
        return [
            _Block(
                self.level, self.node_M[part], self.parent_M[part], self.code_M[part], self.logp_BM[:, part], self.cache
            )
            for part in parts
        ]


def _scored(block: _Block, decoder: Decoder, trie: Trie, memory, normalize: str) -> tuple[np.ndarray, _Block]:
    """The numbers of all children of the block's nodes, and the children as a block of their own."""
    batch, device = len(block.logp_BM), block.logp_BM.device

    def of_all(numbers: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
        return tensor.expand(batch, *tensor.shape)

    level = block.level
    prefix_BML = of_all(trie.prefixes(level, block.node_M))
    hidden_BMD, cache = decoder.decode_step(level, memory, block.cache, of_all(block.parent_M), of_all(block.code_M))
    logits_BMK = decoder.level_logits(level, hidden_BMD, prefix_BML).float()
    children = trie.children(level, block.node_M)
    parent_C, code_C = (torch.from_numpy(part).to(device) for part in (children.parent_index, children.token))
    if normalize == "vocabulary":
        total_BM = decoder.log_partition(level, hidden_BMD, prefix_BML).float()
    elif normalize == "trie":
        valid_MK = torch.zeros(logits_BMK.shape[1:], dtype=torch.bool, device=device)
        valid_MK[parent_C.long(), code_C.long()] = True
        total_BM = logits_BMK.masked_fill(~valid_MK, -torch.inf).logsumexp(-1)
    else:
        total_BM = logits_BMK.logsumexp(-1)
    if not total_BM.isfinite().all() or logits_BMK.isnan().any():
        raise InputError("the model gives NaN or infinite logits; export it again, or serve it in float32")
    step_BC = logits_BMK[:, parent_C, code_C] - total_BM[:, parent_C]
    below = _Block(
        level + 1, children.child, children.parent_index, children.token, block.logp_BM[:, parent_C] + step_BC, cache
    )
    return children.child, below


class Exact(NamedTuple):
    """Of every node, per depth float32 B×n_l: what a search would choose it by, and its log P (0 where nobody asks)."""

    score_L: list[np.ndarray]
    logp_L: list[np.ndarray]


class Replay(NamedTuple):
    """`kept`: per query and depth 1 … L the nodes that were in the beam, best first. `result`: as a search gives it."""

    kept: list[list[np.ndarray]]
    result: BeamResult


def replayed(
    trie: Trie, score_L: Sequence[np.ndarray], widths: Sequence[int], *, top_k: int, logp_BN: np.ndarray | None = None
) -> Replay:  # fmt: skip
    """What a beam of `widths[l]` at depth l + 1 finds that is chosen by `score_L` (per depth B×n_l), the `top_k` best.

    Equal scores are ordered by ID, as in `constrained_beam_search`, which this equals where `score_L` is of `exact_scores`;
    it may as well be any other number of nodes that a search chooses by, such as S of a search that looks ahead. `logp_BN`:
    log P of the nodes of the last depth; without it `result.logp_BK` holds what chose them. Widths of at least n_l keep
    everything; −inf is never kept.
    """
    kept, deepest = [], len(score_L)
    for query in range(len(score_L[0])):
        node_M, levels = np.zeros(1, np.int64), []
        for level, (score_BN, width) in enumerate(zip(score_L, widths, strict=True)):
            child_C = trie.children(level, node_M).child
            score_C = score_BN[query, child_C]
            best_C = np.lexsort((child_C, -score_C))[:width]
            node_M = child_C[best_C[score_C[best_C] > -np.inf]]
            levels.append(node_M)
        kept.append(levels)
    logp_BN = score_L[-1] if logp_BN is None else logp_BN
    return Replay(kept, _result(trie, deepest, [levels[-1][:top_k] for levels in kept], logp_BN))


def _result(trie: Trie, depth: int, nodes: list[np.ndarray], logp_BN: np.ndarray) -> BeamResult:
    """Nodes of one depth, best first, as the result of a search."""
    shape = (len(nodes), max(map(len, nodes)))
    docid_BKL, range_BK2 = np.full((*shape, depth), -1), np.zeros((*shape, 2), np.int64)
    logp_BK = np.full(shape, -np.inf, np.float32)
    for query, node_K in enumerate(nodes):
        at = query, slice(len(node_K))
        docid_BKL[at] = trie.prefixes(depth, node_K)
        range_BK2[at] = np.stack([trie.row_start[depth][node_K + i] for i in (0, 1)], 1)
        logp_BK[at] = logp_BN[query, node_K]
    return BeamResult(*map(torch.from_numpy, (docid_BKL, range_BK2, logp_BK, np.array([len(one) for one in nodes]))))
