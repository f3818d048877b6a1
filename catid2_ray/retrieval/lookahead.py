"""What a beam search sees ahead: how near each node's vector is to the query, and the best word match below it.

S(n) = logp_weight · log P(n | q) + vector_weight · ⟨q, v_n⟩ + lexical_weight · (highest BM25 of the products below n)

One quantity for all nodes of a depth, never renormalised at a node: a score that nobody trained loses .11 recall@50 when it
is (label bias). Down to depth d, v_n is the node's own vector and replaces that of the depth above; below d each level adds
the tail of its code (`node_vectors.py`). q is the query's vector as the release's encoder and adapter make it, of length 1.

A node that came since the release, and that the release's trie lacks, is new to the generator, which would bury it: of
200 products inserted into a release of 6,000, 177 were among the first ten for their exact title. It gets at least the share
of one more child, log 1 / (C + 1) below a node with C children in the release: then all 200 are. So with log P in S a live
trie is searched as one rebuilt from its products but for these nodes.

Unusual: where a depth has no more nodes than the beams have children, the query meets all of them in one product of
matrices; at deeper levels of a CPU only the children that exist are read.

B batch, M beams, C children of the widest node of a level, n nodes of a depth, D width of a vector, N rows of the base,
X nodes whose products have changed, K codes of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.live_nodes import NodesOfView
from catid2_ray.retrieval.live_view import LiveView
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import Children, LiveTensors, TrieTensors

_ROWS = 1024  # node vectors that are widened at a time, half as many bytes as the processor's second cache holds


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """The weights of S; see the recipe's serving.lookahead. With `logp_weight` 0 the generator is not asked at all."""

    logp_weight: float = 0.003
    vector_weight: float = 1.0
    lexical_weight: float = 0.0


class _Tables(NamedTuple):
    """A depth on a device: float16 means of the base, and what `live_nodes.Depth` says, None where nothing has changed."""

    mean_nD: Tensor
    changed_X: Tensor | None = None
    slot_X: Tensor | None = None
    inserted_slot_n: Tensor | None = None
    moved_SD: Tensor | None = None


class _OnDevice(NamedTuple):
    depths: list[_Tables]
    tails: list[Tensor]


_KEPT: WeakKeyDictionary[NodeVectors | NodesOfView, dict[torch.device, _OnDevice]] = WeakKeyDictionary()


def _on_device(nodes: NodeVectors | NodesOfView, device: torch.device) -> _OnDevice:
    """Made at the first search and kept as long as the nodes live; on CPU the release's own memory."""
    cached = _KEPT.setdefault(nodes, {})
    if device not in cached:
        move = lambda array: None if array is None else torch.from_numpy(array).to(device)  # noqa: E731
        if isinstance(nodes, NodeVectors):
            made = _OnDevice([_Tables(move(mean_nD)) for mean_nD in nodes.means], [move(one) for one in nodes.tails])
        else:
            of_base = _on_device(nodes.base, device)
            moved = [{name: move(array) for name, array in depth._asdict().items()} for depth in nodes.depths]
            depths = [tables._replace(**arrays) for tables, arrays in zip(of_base.depths, moved)]
            made = of_base._replace(depths=depths or of_base.depths)
        cached[device] = made
    return cached[device]


class Ahead:
    """A batch of queries before the nodes of a trie. `query_BD`: floats, scaled to length 1 here. `words`: what `best_words`
    gives, needed where `settings.lexical_weight` is not 0. Raises InputError for vectors of another width or not finite."""

    def __init__(
        self,
        settings: Lookahead,
        nodes: NodeVectors | NodesOfView,
        query_BD,
        *,
        device: torch.device | str = "cpu",
        words: list["Words"] | None = None,
    ):
        base, query_BD = nodes if isinstance(nodes, NodeVectors) else nodes.base, torch.as_tensor(query_BD)
        if query_BD.ndim != 2 or query_BD.shape[1] != base.width or not query_BD.isfinite().all():
            raise InputError(
                f"the search looks ahead by query vectors of {base.width} finite numbers, found {tuple(query_BD.shape)}; use the "
                "encoder that made the products' vectors"
            )
        if settings.lexical_weight and words is None:
            raise InputError("a lexical_weight needs the best words below each node (best_words), found none")
        self.settings, self.device = settings, torch.device(device)
        self.query_BD = torch.nn.functional.normalize(query_BD.to(self.device, torch.float32), dim=1)
        self._tables, self._tails = _on_device(nodes, self.device)
        move = lambda of_part: None if of_part is None else of_part.to(self.device)  # noqa: E731
        self._words = [Words(*map(move, of_depth)) for of_depth in words] if settings.lexical_weight else None

    @property
    def asks_the_generator(self) -> bool:
        return self.settings.logp_weight != 0

    def scores(
        self,
        depth: int,
        arrays: TrieTensors | LiveTensors,
        children: Children,
        near_BM: Tensor,
        logp_BMC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(S, ⟨q, v⟩) of children of depth `depth`, both B×M×C. `near_BM`: ⟨q, v⟩ of their parents; `logp_BMC`: their log P,
        None where the generator is not asked."""
        base_BMC, inserted_BMC = arrays.nodes(children)
        if depth <= len(self._tables):
            tables = self._tables[depth - 1]
            near_BMC = self._near(tables, base_BMC, children.live_BMC[..., : base_BMC.shape[2]])
            if inserted_BMC is not None:
                slot_BMC = tables.inserted_slot_n[inserted_BMC]
                near_BMC = torch.cat((near_BMC, _picked(_all_near(tables.moved_SD, self.query_BD), slot_BMC)), 2)
        else:
            tail_KD = self._tails[depth - 1 - len(self._tables)]
            near_BMC = near_BM[..., None] + _picked(_all_near(tail_KD, self.query_BD), children.code_BMC)
        score_BMC = self.settings.vector_weight * near_BMC
        if logp_BMC is not None:
            score_BMC = score_BMC + self.settings.logp_weight * logp_BMC
        if self._words is not None:
            values = [of_part for of_part in self._words[depth - 1] if of_part is not None]
            parts = zip(values, (base_BMC, inserted_BMC))
            best_BMC = torch.cat([_picked(of_part, node_BMC) for of_part, node_BMC in parts], 2)
            score_BMC = score_BMC + self.settings.lexical_weight * best_BMC
        return score_BMC, near_BMC

    def every_node(self, trie: Trie, levels: int, logp_L: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """S of all nodes of the base, per depth 1 … `levels` float32 B×n: what a search that prunes nothing compares. `logp_L`:
        their log P, B×n each, where the generator is asked."""
        score_L, near_Bn = [], None
        for depth in range(1, levels + 1):
            if depth <= len(self._tables):
                near_Bn = self._near_all(self._tables[depth - 1])
            else:
                parent_n = trie.child_start[depth - 1].holding(np.arange(trie.nodes(depth)))
                tail_BK = _all_near(self._tails[depth - 1 - len(self._tables)], self.query_BD)
                code_n = torch.from_numpy(trie.token[depth].astype(np.int64)).to(self.device)
                near_Bn = near_Bn[:, torch.from_numpy(np.asarray(parent_n, np.int64))] + tail_BK[:, code_n]
            score_Bn = self.settings.vector_weight * near_Bn
            if logp_L is not None:
                score_Bn = score_Bn + self.settings.logp_weight * torch.from_numpy(logp_L[depth - 1]).to(self.device)
            if self._words is not None:
                score_Bn = score_Bn + self.settings.lexical_weight * self._words[depth - 1].base_Bn
            score_L.append(score_Bn.cpu().numpy())
        return score_L

    def _near_all(self, tables: _Tables) -> Tensor:
        """float32 B×n, ⟨q, v⟩ of all nodes of a depth."""
        near_Bn = _all_near(tables.mean_nD, self.query_BD)
        if tables.changed_X is not None and len(tables.changed_X):
            near_Bn[:, tables.changed_X] = _all_near(tables.moved_SD, self.query_BD)[:, tables.slot_X]
        return near_Bn

    def _near(self, tables: _Tables, node_BMC: Tensor, live_BMC: Tensor) -> Tensor:
        if _reads_all(len(tables.mean_nD), node_BMC[0].numel(), self.device):
            return _picked(self._near_all(tables), node_BMC)
        near_BMC = torch.zeros(node_BMC.shape)
        at, node_R = live_BMC.flatten().nonzero()[:, 0], node_BMC[live_BMC]
        query_R = at // node_BMC[0].numel()
        for part in torch.arange(len(at)).split(_ROWS):
            vector_RD = tables.mean_nD.index_select(0, node_R[part])
            if tables.changed_X is not None and len(tables.changed_X):
                place_R = torch.searchsorted(tables.changed_X, node_R[part]).clamp(max=len(tables.changed_X) - 1)
                moved_R = tables.changed_X[place_R] == node_R[part]
                vector_RD[moved_R] = tables.moved_SD[tables.slot_X[place_R[moved_R]]]
            near_R = (vector_RD.float() * self.query_BD[query_R[part]]).sum(1)
            near_BMC.view(-1)[at[part]] = near_R
        return near_BMC


def _reads_all(nodes: int, children: int, device: torch.device) -> bool:
    """Whether the query meets all nodes of a depth at once: always where the host must not wait for the device."""
    return device.type != "cpu" or nodes <= children


def _all_near(vector_nD: Tensor, query_BD: Tensor) -> Tensor:
    """float32 B×n; vectors are widened block by block, which stays in the processor's cache."""
    return torch.cat([query_BD @ block_RD.float().T for block_RD in vector_nD.split(_ROWS)], 1)


def _picked(value_Bn: Tensor, index_BMC: Tensor) -> Tensor:
    return value_Bn.gather(1, index_BMC.flatten(1)).view(index_BMC.shape)


class Words(NamedTuple):
    """Of one depth, float32: the highest BM25 below each node of the base (B×n), and below each inserted node (or None)."""

    base_Bn: Tensor
    inserted_Bn: Tensor | None


def best_words(score_BR: np.ndarray, trie: Trie | LiveView, filters: Sequence) -> list[Words]:
    """The highest score of the products below each node, for each depth 1 … L; of live and allowed products alone.

    `score_BR`: float32, the score of each row of the trie (of a view: of the base's rows, then the inserted), none below 0.
    `filters`: as `live.filters_for` gives them.
    """
    live = isinstance(trie, LiveView)
    base, size = (trie.base, trie.base.rows) if live else (trie, trie.rows)
    inserted = trie.inserted if live else None
    base_BN, score_BD = score_BR[:, :size].copy(), None
    if inserted is not None:
        score_BD = score_BR[:, size + inserted.order_D]
    for row, one in enumerate(filters):
        of_base, of_inserted = trie.restricted(one) if live else (one, None)
        if of_base is not None:
            base_BN[row] *= of_base.allowed_N
        if score_BD is not None:
            score_BD[row] *= of_inserted.allowed_N
    words = []
    for depth in range(1, base.levels + 1):
        base_Bn = np.maximum.reduceat(base_BN, np.asarray(base.row_start[depth][:-1], np.int64), axis=1)
        inserted_Bn = None
        if inserted is not None:
            inserted_Bn = np.maximum.reduceat(score_BD, inserted.arrays.row_start[depth][:-1].astype(np.int64), axis=1)
            twin_n = inserted.arrays.twin[depth]
            both = np.flatnonzero(twin_n >= 0)
            highest = np.maximum(inserted_Bn[:, both], base_Bn[:, twin_n[both]])
            inserted_Bn[:, both] = base_Bn[:, twin_n[both]] = highest
        words.append(Words(torch.from_numpy(base_Bn), None if inserted_Bn is None else torch.from_numpy(inserted_Bn)))
    return words
