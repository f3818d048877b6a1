"""Coders beside the trained quantizer, and reading any of them back: hierarchical k-means (DSI, NCI, and Hi-Gen below categories).

The prefix of an ID is a path in a tree. Unusual: the tree is fitted on a bounded sample and split by the number of products
that a node is *expected* to hold in the whole catalogue. `TreeCoder.encode` sums differences in one fixed batch shape instead
of expanding squares into a product of matrices: a row gets the same path whatever rows travel with it, and equal rows always
share theirs. A coder's codes may still be shared by several products; what makes IDs of them is the recipe's `quantizer.ids`.

Shape letters: N, B rows, D embedding, H category depth, C paths or children, L levels, G nodes of a level, E edges,
P nodes that are split, S rows and K children of a node.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from catid2_ray.errors import ArtifactError, InputError, RecipeError
from catid2_ray.quantizer.kmeans import many_kmeans
from catid2_ray.quantizer.model import SETTINGS_FILE, WEIGHTS_FILE, Encoded, ResidualQuantizer, complete_folder

BATCH_ROWS = 1024  # the one batch shape of `encode`
BLOCK_NUMBERS = 2**25  # float32 numbers of the points in one block of nodes while fitting, 128 MiB
ENDED = -1  # state of a row whose path is complete: it takes the reserved code from here on


class CategoryLevel(NamedTuple):
    """One token of the category path. At the next level node e is where edge e leads; node E + g holds the rest of node
    g: rows whose category is missing, or unknown under that parent. They take the last code, which is reserved."""

    codes: int  # most children of a node + 1
    parent_E: Tensor  # int64; edges are sorted by (parent, category)
    category_E: Tensor  # int64
    token_E: Tensor  # int64, rank among the parent's children, in id order

    @classmethod
    def build(cls, state_C: Tensor, category_C: Tensor, nodes: int) -> Self:
        """All children of `nodes` nodes, from the node and the category (−1 = none) of every known path."""
        edge_E2 = torch.unique(torch.stack((state_C, category_C), 1)[category_C >= 0], dim=0)
        parent_E, category_E = edge_E2[:, 0].contiguous(), edge_E2[:, 1].contiguous()
        count_G = torch.bincount(parent_E, minlength=nodes)
        token_E = torch.arange(len(parent_E)) - (count_G.cumsum(0) - count_G)[parent_E]
        return cls(int(count_G.max()) + 1, parent_E, category_E, token_E)

    def step(self, state_B: Tensor, category_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and states at the next level."""
        edges = len(self.parent_E)
        if not edges:
            return torch.full_like(state_B, self.codes - 1), state_B
        stride = int(self.category_E.max()) + 1
        key_B = state_B * stride + category_B.clamp(0, stride - 1)
        edge_B = torch.searchsorted(self.parent_E * stride + self.category_E, key_B).clamp_max_(edges - 1)
        known_B = (self.parent_E[edge_B] == state_B) & (self.category_E[edge_B] == category_B)
        token_B = torch.where(known_B, self.token_E[edge_B], self.codes - 1)
        return token_B, torch.where(known_B, edge_B, edges + state_B)


class BranchLevel(NamedTuple):
    """One token of the k-means path. The children of node g are `count_G[g]` neighbouring rows of `centroid_CD` and the
    nodes of the next level; a node with 0 children ends its path."""

    codes: int  # most children of a node, + 1 where some path ends above or here
    count_G: Tensor  # int64
    centroid_CD: Tensor  # float32

    def step(self, state_B: Tensor, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (nearest child, ties to the lowest code), and states at the next level."""
        node_B = state_B.clamp_min(0)
        count_B = torch.where(state_B == ENDED, 0, self.count_G[node_B])
        first_B = (self.count_G.cumsum(0) - self.count_G)[node_B]
        token_B = torch.zeros_like(state_B)
        least_B = embedding_BD.new_full((len(state_B),), torch.inf)
        for code in range(int(self.count_G.max())):
            child_B = (first_B + code).clamp_max_(len(self.centroid_CD) - 1)
            distance_B = (embedding_BD - self.centroid_CD[child_B]).square_().sum(1)
            nearer_B = (distance_B < least_B) & (code < count_B)
            token_B[nearer_B] = code
            least_B = torch.where(nearer_B, distance_B, least_B)
        ended_B = count_B == 0
        return token_B.masked_fill(ended_B, self.codes - 1), (first_B + token_B).masked_fill(ended_B, ENDED)


class TreeCoder:
    """Codes N×L of embeddings and category paths; L may be 0 (`empty`: the prefix of naive IDs, METHODS 6.3).

    `levels`: the category levels, then the branch levels; `width`: D, or None when no level looks at embeddings.
    """

    def __init__(self, levels: tuple[CategoryLevel | BranchLevel, ...], *, width: int | None):
        self.levels = tuple(levels)
        self.width = width
        self.category_depth = sum(isinstance(level, CategoryLevel) for level in self.levels)

    @classmethod
    def empty(cls) -> Self:
        """The coder without levels: every product has the same, empty prefix."""
        return cls((), width=None)

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        """K_1 … K_L, reserved codes included; the reserved code of a level is its last one."""
        return tuple(level.codes for level in self.levels)

    @classmethod
    def fit(
        cls,
        sample_ND: Tensor,
        category_NH: Tensor | None,
        *,
        branch: int,
        leaf: int,
        category_depth: int = 0,
        paths_CH: Tensor | None = None,
        total_rows: int,
        seed: int,
        max_depth: int = 12,
        iterations: int = 10,
    ) -> Self:
        """The tree of a uniform sample: DSI with branch 10 and leaf 100, NCI with 30 and 30 (METHODS 6.3, 6.4).

        A node is split into at most `branch` children while (its sample rows) × `total_rows` / N exceeds `leaf`, unless
        its rows are all equal or `max_depth` tokens are reached, so a leaf can hold more. With `category_depth` h > 0
        (Hi-Gen, METHODS 6.5) the first h tokens are the category path, ranked in id order among the children of each
        parent in `paths_CH` (int64, all known paths, −1 below the end; None = those of the sample), and k-means goes
        on inside each category. Then every level has a reserved code, as a later product may have no known category;
        with h = 0 only those do at which some path has ended. Deterministic on CPU for a seed and an order of rows.

        Raises RecipeError for settings that describe no tree, InputError for tables that do not fit each other.
        """
        if branch < 2 or leaf < 1 or not 0 <= category_depth <= max_depth:
            raise RecipeError(
                f"a tree needs branch ≥ 2, leaf ≥ 1 and 0 ≤ category_depth ≤ max_depth, found branch {branch}, "
                f"leaf {leaf}, category_depth {category_depth}, max_depth {max_depth}"
            )
        sample_ND = torch.as_tensor(sample_ND).detach().to("cpu", torch.float32)
        category_NH = _checked(sample_ND, category_NH, width=None, depth=category_depth)
        rows = len(sample_ND)
        if not 1 <= rows <= total_rows:
            raise InputError(
                f"a sample has 1 to total_rows = {total_rows} rows, found {rows}: pass the rows it is from"
            )
        levels, state_N, nodes = _category_levels(category_NH, paths_CH, category_depth)
        generator = torch.Generator().manual_seed(seed)
        reserved = category_depth > 0
        while len(levels) < max_depth:
            split_G = torch.bincount(state_N[state_N != ENDED], minlength=nodes) * total_rows > leaf * rows
            count_G, centroid_CD, state_N = _branch(sample_ND, state_N, split_G, branch, iterations, generator)
            if not len(centroid_CD):
                break
            reserved = reserved or bool((count_G == 0).any())
            levels.append(BranchLevel(int(count_G.max()) + reserved, count_G, centroid_CD))
            nodes = len(centroid_CD)
        return cls(tuple(levels), width=sample_ND.shape[1] if len(levels) > category_depth else None)

    @torch.no_grad()
    def encode(self, embedding_ND: Tensor, category_NH: Tensor | None) -> Tensor:
        """int64 codes N×L, on CPU. A row's code depends on that row alone, bit for bit.

        `category_NH` may have more columns than the tree uses, or be None when it uses none. Raises InputError for
        another width, missing columns, tables of different lengths, and rows that are not finite.
        """
        embedding_ND = torch.as_tensor(embedding_ND).detach().to("cpu", torch.float32)
        category_NH = _checked(embedding_ND, category_NH, width=self.width, depth=self.category_depth)
        codes_NL = torch.empty((len(embedding_ND), len(self.levels)), dtype=torch.int64)
        embedding_BD = embedding_ND.new_zeros((BATCH_ROWS, embedding_ND.shape[1]))
        category_BH = category_NH.new_full((BATCH_ROWS, category_NH.shape[1]), -1)
        for start in range(0, len(embedding_ND), BATCH_ROWS):
            rows = min(BATCH_ROWS, len(embedding_ND) - start)
            embedding_BD[:rows] = embedding_ND[start : start + rows]
            category_BH[:rows] = category_NH[start : start + rows]
            state_B = torch.zeros(BATCH_ROWS, dtype=torch.int64)
            for depth, level in enumerate(self.levels):
                seen = category_BH[:, depth] if depth < self.category_depth else embedding_BD
                token_B, state_B = level.step(state_B, seen)
                codes_NL[start : start + rows, depth] = token_B[:rows]
        return codes_NL

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and quantizer.json into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            f"{depth}.{name}": tensor.contiguous()
            for depth, level in enumerate(self.levels)
            for name, tensor in level._asdict().items()
            if name not in ("codes", "token_E")
        }
        settings = {
            "class": "tree",
            "width": self.width,
            "category_depth": self.category_depth,
            "codes_per_level": list(self.codes_per_level),
        }
        save_file(state, folder / WEIGHTS_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The coder that `save` wrote. Raises ArtifactError naming the file that is missing or does not fit."""
        folder = complete_folder(folder)
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text())
            if settings["class"] != "tree":
                raise ValueError(f"its class is {settings['class']!r}, expected 'tree'")
            return cls(_restored(settings, load_file(folder / WEIGHTS_FILE)), width=settings["width"])
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise ArtifactError(
                f"{folder}: {WEIGHTS_FILE} and {SETTINGS_FILE} are no tree ({type(error).__name__}: {error}): "
                f"train it again"
            ) from error


def _restored(settings: dict, state: dict[str, Tensor]) -> tuple[CategoryLevel | BranchLevel, ...]:
    """The levels of a saved tree; ValueError when one does not follow from the one above it."""
    levels, nodes = [], 1
    for depth, codes in enumerate(settings["codes_per_level"]):
        if depth < settings["category_depth"]:
            parent_E, category_E = state[f"{depth}.parent_E"], state[f"{depth}.category_E"]
            level = CategoryLevel.build(parent_E, category_E, nodes)
            fits = level.codes == codes and bool((parent_E < nodes).all())
            fits = fits and torch.equal(level.parent_E, parent_E) and torch.equal(level.category_E, category_E)
            nodes += len(parent_E)
        else:
            level = BranchLevel(codes, state[f"{depth}.count_G"], state[f"{depth}.centroid_CD"])
            children = int(level.count_G.sum())
            fits = len(level.count_G) == nodes and int(level.count_G.min()) >= 0
            fits = fits and codes - int(level.count_G.max()) in (0, 1)
            fits = fits and level.centroid_CD.shape == (children, settings["width"])
            fits = fits and bool(level.centroid_CD.isfinite().all())
            nodes = children
        if not fits:
            raise ValueError(f"level {depth} of {codes} codes does not fit the {nodes} nodes above it")
        levels.append(level)
    return tuple(levels)


def _checked(embedding_ND: Tensor, category_NH: Tensor | None, *, width: int | None, depth: int) -> Tensor:
    """The first `depth` category columns as int64; InputError when the tables do not fit each other or the tree."""
    if embedding_ND.ndim != 2 or (width is not None and embedding_ND.shape[1] != width):
        raise InputError(f"embeddings must be rows × {width or 'width'}, found {tuple(embedding_ND.shape)}")
    broken_N = ~embedding_ND.isfinite().all(1)
    if broken_N.any():
        raise InputError(f"row {int(broken_N.nonzero()[0])} of the embeddings is not finite: embed that product again")
    if depth == 0:
        return torch.empty((len(embedding_ND), 0), dtype=torch.int64)
    shape = None if category_NH is None else tuple(category_NH.shape)
    if shape is None or len(shape) != 2 or shape[0] != len(embedding_ND) or shape[1] < depth:
        raise InputError(
            f"{len(embedding_ND)} embeddings and category_depth {depth} need categories of shape "
            f"({len(embedding_ND)}, ≥ {depth}), found {shape}"
        )
    return torch.as_tensor(category_NH)[:, :depth].to("cpu", torch.int64)


def _category_levels(category_NH: Tensor, paths_CH: Tensor | None, depth: int) -> tuple[list, Tensor, int]:
    """The category levels, the node of each sample row below them, and the number of nodes there."""
    known_CH = category_NH if paths_CH is None else torch.as_tensor(paths_CH).to("cpu", torch.int64)
    if known_CH.ndim != 2 or known_CH.shape[1] < depth:
        raise InputError(f"paths_CH must have at least category_depth = {depth} columns, found {tuple(known_CH.shape)}")
    levels, nodes = [], 1
    state_N, state_C = (torch.zeros(len(table), dtype=torch.int64) for table in (category_NH, known_CH))
    for column in range(depth):
        # A path goes on below its end only by mistake; without a category there is no node to hang children on.
        ended_C = (known_CH[:, :column] < 0).any(1)
        level = CategoryLevel.build(state_C, known_CH[:, column].masked_fill(ended_C, -1), nodes)
        _, state_N = level.step(state_N, category_NH[:, column])
        _, state_C = level.step(state_C, known_CH[:, column])
        nodes += len(level.parent_E)
        levels.append(level)
    return levels, state_N, nodes


def _branch(sample_ND: Tensor, state_N: Tensor, split_G: Tensor, branch: int, iterations: int, generator):
    """Children of every node marked in `split_G`: (count_G, centroid_CD, state_N at the next level)."""
    inside_N = torch.nonzero((state_N != ENDED) & split_G[state_N.clamp_min(0)]).flatten()
    order_N = inside_N[torch.argsort(state_N[inside_N], stable=True)]
    node_P, size_P = torch.unique_consecutive(state_N[order_N], return_counts=True)
    live_PK = torch.zeros((len(node_P), branch), dtype=torch.bool)
    centroid_PKD = sample_ND.new_zeros((len(node_P), branch, sample_ND.shape[1]))
    code_N = torch.zeros_like(state_N)
    for some_P, index_PS, valid_PS in _blocks(order_N, size_P, sample_ND.shape[1]):
        clusters = many_kmeans(sample_ND[index_PS], valid_PS, codes=branch, iterations=iterations, generator=generator)
        centroid_PKD[some_P], live_PK[some_P] = clusters.centroid_GKD, clusters.live_GK
        code_N[index_PS[valid_PS]] = clusters.code_GS[valid_PS]
    # One child holds the same rows as its parent: they are equal, at least to rounding, and the path ends here.
    live_PK &= live_PK.sum(1, keepdim=True) > 1
    count_G = torch.zeros(len(split_G), dtype=torch.int64).index_put_((node_P,), live_PK.sum(1))
    child_PK = (live_PK.flatten().cumsum(0) - 1).view_as(live_PK).masked_fill(~live_PK, ENDED)
    next_N = torch.full_like(state_N, ENDED)
    next_N[order_N] = child_PK[torch.repeat_interleave(size_P), code_N[order_N]]
    return count_G, centroid_PKD[live_PK], next_N


def _blocks(order_N: Tensor, size_P: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Nodes of similar size together: (nodes, their rows P×S, which slots hold one); each node in one block."""
    start_P = size_P.cumsum(0) - size_P
    bucket_P = torch.ceil(torch.log2(size_P.double())).long()
    for bucket in torch.unique(bucket_P).tolist():
        member_P = torch.nonzero(bucket_P == bucket).flatten()
        widest = int(size_P[member_P].max())
        for some_P in member_P.split(max(1, BLOCK_NUMBERS // (widest * max(width, 1)))):
            slot_S = torch.arange(widest)
            valid_PS = slot_S < size_P[some_P, None]
            yield some_P, order_N[(start_P[some_P, None] + slot_S).clamp_max(len(order_N) - 1)], valid_PS


Coder = ResidualQuantizer | TreeCoder


def load_coder(folder: str | Path) -> Coder:
    """What `save` of either class wrote, on CPU. Raises ArtifactError naming what is missing or does not fit."""
    path = Path(folder) / SETTINGS_FILE
    try:
        kind = json.loads(path.read_text()).get("class", "residual")
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}), so {folder} is no quantizer: train it again") from None
    return TreeCoder.load(folder) if kind == "tree" else ResidualQuantizer.load(folder).eval()


def encode(coder: Coder, embedding_ND: Tensor, category_NH: Tensor, *, rows: int) -> Encoded:
    """Codes N×L and last-level residuals N×Z (N×0 for a tree), each row's the same bits whatever rows are beside it.

    `rows`: the one batch shape that a `ResidualQuantizer` works in.
    """
    if isinstance(coder, TreeCoder):
        return Encoded(coder.encode(embedding_ND, category_NH), embedding_ND.new_empty(len(embedding_ND), 0))
    return coder.encode_padded(embedding_ND, category_NH, rows=rows)
