"""What a beam search sees ahead: how near each node's vector is to the query, and the best word match below it.

S(n) = logp_weight · log P(n | q) + vector_weight · ⟨q, v_n⟩ + lexical_weight · (highest BM25 of the products below n)

One quantity for all nodes of a depth, never renormalised at a node: a score that nobody trained loses .11 recall@50 when it
is (label bias). Down to depth d, v_n is the node's own vector and replaces that of the depth above; below d each level adds
the tail of its code (`node_vectors.py`). q is the query's vector as the release's encoder and adapter make it, of length 1.

Unusual: where a depth has no more nodes than the beams have children, the query meets all of them in one product of
matrices; at deeper levels of a CPU only the children that exist are read.

B batch, M beams, C children of the widest node of a level, n nodes of a depth, D width of a vector, N rows of the base,
X nodes whose products have changed, K codes of a level.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.live import LiveView, codes_of
from catid2_ray.retrieval.node_vectors import NodeVectors, mean_of
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import Children, LiveTensors, TrieTensors
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore

_ROWS = 1024  # node vectors that are widened at a time, half as many bytes as the processor's second cache holds


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """The weights of S; see the recipe's serving.lookahead. With `logp_weight` 0 the generator is not asked at all."""

    logp_weight: float = 0.003
    vector_weight: float = 1.0
    lexical_weight: float = 0.0


class _Depth(NamedTuple):
    """One depth of a view: `changed_X` nodes (ascending) with vectors of their own, `inserted_nD` of the inserted nodes."""

    changed_X: np.ndarray
    changed_XD: np.ndarray
    inserted_nD: np.ndarray | None


@dataclass(frozen=True, eq=False)
class NodesOfView:
    """The vectors of a release's nodes, and of those that live changes have moved; immutable. `depths`: one for each depth
    with means, empty while nothing has changed."""

    base: NodeVectors
    depths: tuple[_Depth, ...] = ()


class LiveNodes:
    """Keeps the vectors of nodes at the mean of their live products. Tails stay those of the release.

    A change costs one pass over the vectors of the products below the d nodes above it, at the first search of its view.
    Means are those of a trie rebuilt from the live products, to the last bit.
    """

    def __init__(self, nodes: NodeVectors, trie: Trie):
        nodes.check(trie)
        self._space, self._lock = DocidSpace(trie.codes_per_level), threading.Lock()
        self._live = (Filter.all_of(trie.rows).words_W, np.zeros(1, np.uint64))
        # By depth: packed prefix → (its node of the base, −1 where it has none; its vector).
        self._moved: list[dict[int, tuple[int, np.ndarray]]] = [{} for _ in nodes.means]
        self._view, self._nodes = None, NodesOfView(nodes)

    def at(self, view: LiveView, vectors: VectorStore | GrownVectors | None) -> NodesOfView:
        """The vectors as they are in `view`. `vectors`: of its products, and maybe of later ones; may be None while nothing
        has come or gone, else InputError."""
        with self._lock:
            if view is not self._view:
                self._follow(view, vectors)
            return self._nodes

    def _follow(self, view: LiveView, vectors) -> None:
        live = (view.live_base.words_W, view.live_inserted.words_W)
        base, inserted = (_differing(before_W, now_W) for before_W, now_W in zip(self._live, live))
        rows = np.concatenate((base, view.base.rows + inserted))
        if len(rows):
            if vectors is None:
                raise InputError(
                    "products have come or gone, but the release has no vectors of products, so the vectors of its nodes "
                    "cannot follow; make its serving part again"
                )
            # A view taken earlier, by a search that still runs, does not know the rows inserted since.
            known = view if self._view is None or view.rows >= self._view.rows else self._view
            codes_ML = codes_of(known, rows)
            for depth, moved in enumerate(self._moved, 1):
                moved |= self._recomputed(view, vectors, codes_ML, depth)
        self._live, self._view = live, view
        depths = tuple(self._depth(view, depth) for depth in range(1, len(self._moved) + 1))
        untouched = view.inserted is None and not self._moved[0]
        self._nodes = NodesOfView(self._nodes.base, () if untouched else depths)

    def _recomputed(self, view: LiveView, vectors, codes_ML: np.ndarray, depth: int) -> dict:
        """What `_moved` holds, of the nodes of a depth above these IDs."""
        recomputed = {}
        packed_P, first_P = np.unique(self._space.prefix_of(self._space.pack(codes_ML), depth), return_index=True)
        inserted = view.inserted
        prefix_D = np.empty(0, np.int64) if inserted is None else self._space.prefix_of(inserted.packed_D, depth)
        ranges = np.searchsorted(prefix_D, [packed_P, packed_P + 1]).T
        for packed, first, (low, high) in zip(packed_P.tolist(), first_P.tolist(), ranges.tolist()):
            start, end = view.base.item_range(codes_ML[first, :depth])
            node = int(view.base.row_start[depth].holding(np.array([start]))[0]) if end > start else -1
            below = np.arange(start, end)
            if high > low:
                below = np.append(below, view.base.rows + inserted.order_D[low:high])
            recomputed[packed] = node, mean_of(vectors, below[view.is_live(below)])
        return recomputed

    def _depth(self, view: LiveView, depth: int) -> _Depth:
        moved, width = self._moved[depth - 1], self._nodes.base.width
        changed = sorted(((node, vector_D) for node, vector_D in moved.values() if node >= 0), key=lambda pair: pair[0])
        changed_X = np.array([node for node, _ in changed], np.int64)
        changed_XD = np.array([vector_D for _, vector_D in changed], np.float16).reshape(-1, width)
        if view.inserted is None:
            return _Depth(changed_X, changed_XD, None)
        first_n = view.inserted.arrays.row_start[depth][:-1]
        packed_n = self._space.prefix_of(view.inserted.packed_D[first_n], depth)
        # What was inserted and withdrawn between two searches has not moved anything: no beam reaches it alone.
        nowhere = (-1, np.zeros(width, np.float16))
        return _Depth(changed_X, changed_XD, np.stack([moved.get(packed, nowhere)[1] for packed in packed_n.tolist()]))


def _differing(one_W: np.ndarray, two_W: np.ndarray) -> np.ndarray:
    """int64, the rows whose bits differ; words that one side lacks are 0."""
    words = max(len(one_W), len(two_W))
    both_W = np.bitwise_xor(*(np.pad(each_W, (0, words - len(each_W))) for each_W in (one_W, two_W)))
    word = np.flatnonzero(both_W)
    at, bit = np.nonzero(np.unpackbits(both_W[word].view(np.uint8), bitorder="little").reshape(-1, 64))
    return word[at] * 64 + bit


class _Tables(NamedTuple):
    """A depth on a device: float16 means of the base, and what `_Depth` says, None where nothing has changed."""

    mean_nD: Tensor
    changed_X: Tensor | None = None
    changed_XD: Tensor | None = None
    inserted_nD: Tensor | None = None


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
            near_BMC = self._near(self._tables[depth - 1], base_BMC, children.live_BMC[..., : base_BMC.shape[2]])
            if inserted_BMC is not None:
                of_inserted = _all_near(self._tables[depth - 1].inserted_nD, self.query_BD)
                near_BMC = torch.cat((near_BMC, _picked(of_inserted, inserted_BMC)), 2)
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
            near_Bn[:, tables.changed_X] = _all_near(tables.changed_XD, self.query_BD)
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
                vector_RD[moved_R] = tables.changed_XD[place_R[moved_R]]
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
