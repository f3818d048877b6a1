"""A trie, or a live view of one, as tensors of one device: the children of many beams by array operations alone.

A beam's place is a number per part: its node of the trie and, in a live view, its node among the inserted products, −1
where it has none. A prefix that lives in both parts is a candidate once, as the trie's child; which of the inserted
nodes it is, is looked up for the survivors only. So a live search costs a plain one, a filter (the rows that are not
withdrawn) and the inserted children beside it.

B batch, M beams, C children of the widest node of a level (of both parts, one after the other), W beams kept, N rows of
the trie, n nodes of a depth.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from catid2_ray.retrieval.filters import Filter, FilterTensors, LiveFilter, allowed_before, stacked
from catid2_ray.retrieval.inserted import Inserted
from catid2_ray.retrieval.live_view import LiveView
from catid2_ray.retrieval.trie import Trie


class Children(NamedTuple):
    """What a level offers: the `code` of each child, its `rank` (int64 below 2^32, in the order of IDs within a query),
    whether it is `live`; all B×M×C. `widest`: C. `rest`: what `TrieTensors.kept` and `LiveTensors.kept` need."""

    code_BMC: Tensor
    rank_BMC: Tensor
    live_BMC: Tensor
    widest: int
    rest: object = None


class LiveFilterTensors(NamedTuple):
    """Allowed and live rows of a view: of the base (None: all), and inserted ones in ID order."""

    base: FilterTensors | None
    inserted: FilterTensors


def filter_tensors(
    filters: list[Filter | LiveFilter | None], trie: Trie | LiveView, device: torch.device
) -> FilterTensors | LiveFilterTensors | None:
    """Which rows each query may find, on the device; None for all of a trie. `filters`: as `live.filters_for` gives
    them."""
    unfiltered = all(one is None for one in filters)
    if not isinstance(trie, LiveView):
        everything = Filter.all_of(trie.rows) if None in filters and not unfiltered else None
        return None if unfiltered else stacked([everything if one is None else one for one in filters], device)
    base, inserted = zip(*(trie.restricted(one) for one in filters))
    of_base = None if unfiltered and trie.whole else stacked(base, device)
    return of_base if trie.inserted is None else LiveFilterTensors(of_base, stacked(inserted, device))


class _Starts(NamedTuple):
    """`arrays.Starts` as tensors of one device: the numbers themselves, or the exceptions to one entry a range."""

    whole: Tensor | None
    extra: Tensor | None

    def at(self, index: Tensor) -> Tensor:
        """int64, the start of each range `index` (int64, any shape)."""
        if self.whole is None:
            return index + torch.searchsorted(self.extra, index.to(self.extra.dtype))
        return _taken(self.whole, index)


def _taken(table: Tensor, index: Tensor) -> Tensor:
    """int64 `table[index]`; only what was taken is widened."""
    return table.index_select(0, index.flatten()).view(index.shape).long()


def _alive(filter_: FilterTensors, row_BMC1: Tensor) -> Tensor:
    """bool B×M×C: whether an allowed row lies between each boundary and the next."""
    before_BMC1 = allowed_before(filter_, row_BMC1)
    return before_BMC1[..., 1:] > before_BMC1[..., :-1]


class TrieTensors:
    """A trie's arrays on a device (on CPU the same memory), of the small types that they are stored in."""

    def __init__(self, trie: Trie, device: torch.device):
        def move(array) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device)

        self.child_start, self.row_start = (
            [_Starts(move(starts.whole), move(starts.extra)) for starts in part]
            for part in (trie.child_start, trie.row_start)
        )
        self.token = [move(token) for token in trie.token]
        self.widest, self.device = trie.widest, device

    def root(self, batch: int) -> tuple[Tensor]:
        return (torch.zeros(batch, 1, dtype=torch.long, device=self.device),)

    def children(self, level: int, place: tuple[Tensor], alive_BM: Tensor, prefix_BML, filter_) -> Children:
        """Of beams of depth `level`; none of those that are not `alive`. `filter_`: FilterTensors or None."""
        (node_BM,) = place
        start_BM1, end_BM1 = (self.child_start[level].at(node_BM + i)[..., None] for i in (0, 1))
        # Children of a node lie end to end: C + 1 boundaries bound them all.
        edge_BMC1 = start_BM1 + torch.arange(self.widest[level] + 1, device=start_BM1.device)
        child_BMC = edge_BMC1[..., :-1]
        live_BMC = (child_BMC < end_BM1) & alive_BM[..., None]
        if filter_ is not None:
            live_BMC &= _alive(filter_, self.row_start[level + 1].at(torch.minimum(edge_BMC1, end_BM1)))
        child_BMC = torch.where(live_BMC, child_BMC, 0)
        return Children(_taken(self.token[level + 1], child_BMC), child_BMC, live_BMC, self.widest[level])

    def fair(self, level: int, place: tuple[Tensor], children: Children, step_BMC: Tensor) -> Tensor:
        """`step_BMC` as it is: the generator has learnt all nodes. See `LiveTensors.fair`."""
        return step_BMC

    def renormalized(self, level: int, place: tuple[Tensor], children: Children, logits_BMK: Tensor) -> Tensor:
        """B×M×C, log p of each child among *all* children that its node has in the trie, whatever a filter leaves of them."""
        return logits_BMK.gather(-1, children.code_BMC) - self.partition(level, place[0], logits_BMK)

    def partition(self, level: int, node_BM: Tensor, logits_BMK: Tensor) -> Tensor:
        """B×M×1, log Σ exp over the children of nodes of depth `level`."""
        own = self.children(level, (node_BM,), torch.ones_like(node_BM, dtype=torch.bool), None, None)
        logit_BMC = logits_BMK.gather(-1, own.code_BMC).masked_fill(~own.live_BMC, -torch.inf)
        return logit_BMC.logsumexp(-1, keepdim=True)

    def decided(self, level: int, place: tuple[Tensor], levels: int) -> Tensor:
        """bool B×M: whether the trie has one way from a node of depth `level` down to depth `levels`."""
        (node_BM,) = place
        decided_BM = torch.ones_like(node_BM, dtype=torch.bool)
        for depth in range(level, levels):
            start_BM = self.child_start[depth].at(node_BM)
            decided_BM &= self.child_start[depth].at(node_BM + 1) - start_BM == 1
            node_BM = start_BM
        return decided_BM

    def kept(self, level: int, children: Children, index_BW: Tensor, code_BW: Tensor) -> tuple[Tensor]:
        """The places of the children at `index_BW` (0 … M·C − 1)."""
        return (children.rank_BMC.flatten(1).gather(1, index_BW),)

    def nodes(self, children: Children) -> tuple[Tensor, None]:
        """int64 B×M×C, the node of each child; None for the inserted ones."""
        return children.rank_BMC, None

    def ranges(self, level: int, place: tuple[Tensor]) -> tuple[Tensor, None]:
        """int64 B×W×2, the rows of nodes of depth `level`; None for the inserted ones."""
        return torch.stack([self.row_start[level].at(place[0] + i) for i in (0, 1)], 2), None


class _InsertedChildren(NamedTuple):
    """Beside the trie's children: the inserted node's child of each slot, its code, whether a row of it is live."""

    child_BMC: Tensor
    code_BMC: Tensor
    live_BMC: Tensor


class LiveTensors:
    """A live view on a device; its inserted products' arrays are moved once per view, the trie's once."""

    def __init__(self, view: LiveView, device: torch.device):
        self.base = tensors(view.base, device)
        self.codes, self.widest, self.rows = view.codes_per_level, view.inserted.widest, view.base.rows
        move = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        self.child_start, self.row_start, self.token, self.twin = (
            [move(array) for array in part] for part in view.inserted.arrays
        )

    def root(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.base.root(batch) * 2

    def children(self, level: int, place, alive_BM: Tensor, prefix_BML: Tensor, filter_) -> Children:
        """As TrieTensors.children; `filter_`: FilterTensors of base rows and of inserted rows in ID order."""
        node_BM, inner_BM = place
        of_base, of_inserted = filter_
        base = self.base.children(level, (node_BM.clamp(min=0),), alive_BM & (node_BM >= 0), prefix_BML, of_base)
        mine, only_BMC = self._inserted(level, inner_BM, alive_BM, of_base, of_inserted)
        code_BMC = torch.cat((base.code_BMC, mine.code_BMC), 2)
        # Nodes of both parts have no numbers in common: IDs are ordered by their parents' order and their code.
        packed_BM = torch.zeros_like(node_BM)
        for depth in range(level):
            packed_BM = packed_BM * self.codes[depth] + prefix_BML[..., depth]
        rank_BM = packed_BM.argsort(1).argsort(1)
        rank_BMC = rank_BM[..., None] * self.codes[level] + code_BMC
        live_BMC = torch.cat((base.live_BMC, only_BMC), 2)
        return Children(code_BMC, rank_BMC, live_BMC, live_BMC.shape[2], (base.rank_BMC, mine))

    def _inserted(self, level: int, inner_BM: Tensor, alive_BM: Tensor, of_base, of_inserted):
        """(inserted children, which of them are candidates of their own: live, and no live child of the trie)."""
        start_BM1, end_BM1 = (_taken(self.child_start[level], inner_BM.clamp(min=0) + i)[..., None] for i in (0, 1))
        edge_BMC1 = start_BM1 + torch.arange(self.widest[level] + 1, device=start_BM1.device)
        child_BMC = edge_BMC1[..., :-1]
        live_BMC = (child_BMC < end_BM1) & (alive_BM & (inner_BM >= 0))[..., None]
        live_BMC &= _alive(of_inserted, _taken(self.row_start[level + 1], torch.minimum(edge_BMC1, end_BM1)))
        child_BMC = torch.where(live_BMC, child_BMC, 0)
        twin_BMC = _taken(self.twin[level + 1], child_BMC)
        covered_BMC = twin_BMC >= 0
        if of_base is not None:
            first_BMC, end_BMC = (self.base.row_start[level + 1].at(twin_BMC.clamp(min=0) + i) for i in (0, 1))
            covered_BMC &= allowed_before(of_base, end_BMC) > allowed_before(of_base, first_BMC)
        code_BMC = _taken(self.token[level + 1], child_BMC)
        return _InsertedChildren(child_BMC, code_BMC, live_BMC), live_BMC & ~covered_BMC

    def fair(self, level: int, place, children: Children, step_BMC: Tensor) -> Tensor:
        """log p of each child given its beam, at least log 1 / (C + 1) for a node that the trie lacks, where its parent has C
        children in the trie: the generator has never met such a node, so its own word would bury what came since."""
        return torch.maximum(step_BMC, self._shares(level, self._released(level, place), children))

    def _released(self, level: int, place) -> Tensor:
        """int64 B×M, the node of the release's trie, −1 where it has none; one whose rows are all withdrawn by its twin."""
        node_BM, inner_BM = place
        twin_BM = _taken(self.twin[level], inner_BM.clamp(min=0)).masked_fill(inner_BM < 0, -1)
        return torch.where(node_BM >= 0, node_BM, twin_BM)

    def _shares(self, level: int, node_BM: Tensor, children: Children) -> Tensor:
        """B×M×C: log 1 / (C + 1) of the children that the trie lacks, −inf of the others; `node_BM`: as of `_released`."""
        base_BMC, mine = children.rest
        first_BM, end_BM = (self.base.child_start[level].at(node_BM.clamp(min=0) + i) for i in (0, 1))
        share_BM = -torch.log1p(((end_BM - first_BM) * (node_BM >= 0)).float())
        new_BMC = _taken(self.twin[level + 1], mine.child_BMC) < 0
        share_BMC = torch.where(new_BMC, share_BM[..., None], -torch.inf)
        return torch.nn.functional.pad(share_BMC, (base_BMC.shape[2], 0), value=-torch.inf)

    def renormalized(self, level: int, place, children: Children, logits_BMK: Tensor) -> Tensor:
        """As TrieTensors.renormalized, over the release's children. A child that the release lacks has log 1 / (C + 1), as it
        would be one more: the generator was never told what its logit is worth."""
        node_BM = self._released(level, place)
        share_BMC = self._shares(level, node_BM, children)
        total_BM1 = self.base.partition(level, node_BM.clamp(min=0), logits_BMK)
        return torch.where(share_BMC > -torch.inf, share_BMC, logits_BMK.gather(-1, children.code_BMC) - total_BM1)

    def decided(self, level: int, place, levels: int) -> Tensor:
        """As TrieTensors.decided, in the release: shares of newcomers ask for no logit."""
        node_BM = self._released(level, place)
        return (node_BM < 0) | self.base.decided(level, (node_BM.clamp(min=0),), levels)

    def kept(self, level: int, children: Children, index_BW: Tensor, code_BW: Tensor) -> tuple[Tensor, Tensor]:
        base_BMC, mine = children.rest
        parent_BW, slot_BW = index_BW // children.widest, index_BW % children.widest
        wide = base_BMC.shape[2]
        of_base_BW = slot_BW < wide
        base_BW = base_BMC.flatten(1).gather(1, parent_BW * wide + slot_BW.clamp(max=wide - 1))
        rows_BW1 = parent_BW[..., None].expand(-1, -1, mine.child_BMC.shape[2])
        same_BWC = (mine.code_BMC.gather(1, rows_BW1) == code_BW[..., None]) & mine.live_BMC.gather(1, rows_BW1)
        at_BW1 = same_BWC.byte().argmax(2, keepdim=True)
        inner_BW = mine.child_BMC.gather(1, rows_BW1).gather(2, at_BW1)[..., 0]
        return torch.where(of_base_BW, base_BW, -1), torch.where(same_BWC.any(2), inner_BW, -1)

    def nodes(self, children: Children) -> tuple[Tensor, Tensor]:
        """int64 B×M×C twice, C of the trie's children and C of the inserted ones: their nodes in either part."""
        base_BMC, mine = children.rest
        return base_BMC, mine.child_BMC

    def ranges(self, level: int, place) -> tuple[Tensor, Tensor]:
        """int64 B×W×2 twice: rows of the trie, and rows of inserted products (N + their place in ID order)."""
        node_BW, inner_BW = place
        base_BW2, _ = self.base.ranges(level, (node_BW.clamp(min=0),))
        inner_BW2 = torch.stack([_taken(self.row_start[level], inner_BW.clamp(min=0) + i) for i in (0, 1)], 2)
        base_BW2 = base_BW2.masked_fill((node_BW < 0)[..., None], 0)
        return base_BW2, (inner_BW2 + self.rows).masked_fill((inner_BW < 0)[..., None], 0)


_KEPT: WeakKeyDictionary[Trie | Inserted, dict[torch.device, TrieTensors | LiveTensors]] = WeakKeyDictionary()


def tensors(trie: Trie | LiveView, device: torch.device) -> TrieTensors | LiveTensors:
    """Made at the first search and kept as long as the trie, or the view's inserted products, live."""
    live = isinstance(trie, LiveView)
    if live and trie.inserted is None:
        return tensors(trie.base, device)
    cached = _KEPT.setdefault(trie.inserted if live else trie, {})
    if device not in cached:
        cached[device] = (LiveTensors if live else TrieTensors)(trie, device)
    return cached[device]


def continuations(trie: Trie, codes_BL: Tensor) -> list[Tensor]:
    """Per level bool B×K_l: the codes that IDs of the trie have after the first l codes of each row, an ID of the trie."""
    arrays = tensors(trie, codes_BL.device)
    place, alive_B1, valid = arrays.root(len(codes_BL)), torch.ones_like(codes_BL[:, :1], dtype=torch.bool), []
    for level, codes in enumerate(trie.codes_per_level):
        children = arrays.children(level, place, alive_B1, None, None)
        code_BC, live_BC = children.code_BMC[:, 0], children.live_BMC[:, 0]
        valid_BK = torch.zeros(len(code_BC), codes + 1, dtype=torch.bool, device=code_BC.device)
        # What is no child is written beside the codes.
        valid.append(valid_BK.scatter_(1, torch.where(live_BC, code_BC, codes), True)[:, :codes])
        at_B1 = (live_BC & (code_BC == codes_BL[:, level, None])).byte().argmax(1, keepdim=True)
        place = arrays.kept(level, children, at_B1, codes_BL[:, level, None])
    return valid
