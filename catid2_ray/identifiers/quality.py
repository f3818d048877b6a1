"""How good IDs are: collisions, use of the codes, agreement with categories and embeddings; plain numbers for JSON.

Agreement stands beside the same figure for shuffled categories or random products, because many small prefixes agree
with anything for free. A mean over nothing is None, not 0, but for purity and AMI, which `purity_products` explains.

N products, L levels, H category depth, K codes of a level, D embedding width, P pairs, Q query products.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score

from catid2_ray.docid import LEVEL_LETTERS, DocidSpace
from catid2_ray.errors import InputError

SHUFFLE_SEED = 0
AMI_ROWS = 50_000  # a seeded sample beyond: the chance correction costs clusters × categories, 4 s here for 3 depths
HOURGLASS_TOLERANCE = 0.02  # normalised entropy
_BLOCK_NUMBERS = 2**24  # float32 numbers of one block of similarities, 64 MiB


def id_quality(codes_NL, category_NH, codes_per_level) -> dict:
    """Diagnostics of the IDs `codes_NL` (integers N×L, 0 … K_l − 1), which catch collapse; none is an objective.

    `category_NH`: integers N×H, the category of each product at depths 1 … H, −1 where its path is shorter; H may be
    0. Returns a dict:

    - `products`, `ids`; `collision_rate`, (N − distinct IDs) / N (LC-Rec); `shared_rate`, the share of products whose
      ID another product has (sidlens, VARG), 1 to 2 times the former for pairs; `largest_bucket`, `p99_bucket`,
      `mean_bucket`, products per used ID; `gini_ids` over used IDs (FORGE), 0 = even;
    - lists over levels: `codes_used`, `codes_used_share`, `perplexity` exp(H), `normalised_entropy` H / ln K (1 where
      K = 1), `conditional_entropy` H(c_l | c_<l) in nats, `gini` over all K codes, `top_share` of the commonest code;
    - lists over depths 1 … min(H, L): `purity`, products of their prefix's commonest category / products that have a
      category at that depth, `purity_shuffled`, the same with those categories permuted, `purity_products`, how many
      products that is; `ami` and `ami_shuffled`, the adjusted mutual information of the same prefixes and categories,
      0 = chance, 1 = equal partitions (Vinh et al. 2010, arithmetic mean; sklearn), on at most AMI_ROWS products
      (METHODS 8.5). All are 0 when no product has a category.

    Raises InputError for an empty table, codes out of range, or categories of another number of rows.
    """
    space = DocidSpace(tuple(codes_per_level))
    codes_NL, category_NH = space.check(np.asarray(codes_NL)), np.asarray(category_NH)
    if not len(codes_NL):
        raise InputError("no IDs to describe, found an empty table; pass the IDs of the catalogue")
    if category_NH.ndim != 2 or len(category_NH) != len(codes_NL) or category_NH.dtype.kind not in "iu":
        raise InputError(
            f"categories must be an integer array {len(codes_NL)}×H, found {category_NH.dtype} of shape "
            f"{category_NH.shape}"
        )
    packed_N = space.pack(codes_NL)
    depths = [
        _agreement(space.prefix_of(packed_N, depth + 1), category_NH[:, depth])
        for depth in range(min(category_NH.shape[1], space.levels))
    ]
    return code_figures(packed_N, space) | {name: [depth[name] for depth in depths] for name in _AGREEMENT}


def code_figures(packed_N, space: DocidSpace) -> dict:
    """The figures of `id_quality` that need no categories, from packed IDs alone: about 32 bytes a product."""
    figures = CodeFigures(space)
    figures.add(np.sort(packed_N))
    return figures.figures()


class CodeFigures:
    """`code_figures` of packed IDs that come in ascending ranges, in the memory of one range.

    Kept are how often each code occurs and, of each depth, how many prefixes have how many products: few numbers, since few
    sizes differ. So the figures are the same however the IDs are cut.
    """

    def __init__(self, space: DocidSpace):
        self.space, self.products = space, 0
        self._times = [np.zeros(k, np.int64) for k in space.codes_per_level]
        self._sizes: list[Counter] = [Counter() for _ in range(space.levels + 1)]
        self._open: list[tuple[int | None, int]] = [(None, 0)] * (space.levels + 1)  # the last prefix, and its products

    def add(self, sorted_n: np.ndarray) -> None:
        """The next packed IDs (int64 n, ascending, none below what was added before; equal ones count)."""
        if not len(sorted_n):
            return
        self.products += len(sorted_n)
        for radix, times_K in zip(self.space.radix_L, self._times):
            times_K += np.bincount(sorted_n // radix % len(times_K), minlength=len(times_K))
        for depth, sizes in enumerate(self._sizes):
            prefix_n = self.space.prefix_of(sorted_n, depth)
            size, (known, held) = _runs(prefix_n), self._open[depth]
            if known == prefix_n[0]:
                size[0] += held
            elif held:
                sizes[held] += 1
            found, times = np.unique(size[:-1], return_counts=True)
            sizes.update(dict(zip(found.tolist(), times.tolist())))
            self._open[depth] = int(prefix_n[-1]), int(size[-1])

    def figures(self) -> dict:
        sizes = [_Sizes.of(sizes + Counter([held])) for sizes, (_, held) in zip(self._sizes, self._open)]
        levels, bucket = [_level(times_K) for times_K in self._times], sizes[-1]
        joint = [_entropy(depth.size, depth.times) for depth in sizes]
        return {
            "products": self.products,
            "ids": bucket.count,
            "collision_rate": (self.products - bucket.count) / self.products,
            "shared_rate": int((bucket.size * bucket.times)[bucket.size > 1].sum()) / self.products,
            "largest_bucket": int(bucket.size[-1]),
            "p99_bucket": bucket.percentile(99),
            "mean_bucket": self.products / bucket.count,
            "gini_ids": bucket.gini(),
            **{name: [level[name] for level in levels] for name in levels[0]},
            "conditional_entropy": [max(b - a, 0.0) for a, b in zip(joint, joint[1:])],
        }


class _Sizes(NamedTuple):
    """`times` groups have `size` products each; sizes ascend."""

    size: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, counted: Counter) -> "_Sizes":
        return cls(*(np.array(column, np.int64) for column in zip(*sorted(counted.items()))))

    @property
    def count(self) -> int:
        return int(self.times.sum())

    def percentile(self, percent: float) -> float:
        """As numpy's, of the sizes written out: linear between neighbours."""
        place, ends = (self.count - 1) * (percent / 100), np.cumsum(self.times)
        low, high = (
            self.size[np.searchsorted(ends, int(at), side="right")] for at in (place, min(place + 1, ends[-1] - 1))
        )
        return float(low + (high - low) * (place - int(place)))

    def gini(self) -> float:
        """Gini coefficient: 0 when all are equal, near 1 when one holds everything (FORGE, 2509.20904)."""
        n, total, weighted, before = self.count, int((self.size * self.times).sum()), 0, 0
        for size, times in zip(self.size.tolist(), self.times.tolist()):
            weighted += size * (times * (n - before) - times * (times - 1) // 2)
            before += times
        return (n + 1) / n - 2 * weighted / (n * total)


def _runs(sorted_N) -> np.ndarray:
    """How often each value of a sorted array occurs, in order."""
    first = np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1])))
    return np.diff(np.append(first, len(sorted_N)))


def _level(count_K: np.ndarray) -> dict:
    entropy, k = _entropy(count_K, 1), len(count_K)
    return {
        "codes_used": int((count_K > 0).sum()),
        "codes_used_share": float((count_K > 0).mean()),
        "perplexity": float(np.exp(entropy)),
        "normalised_entropy": entropy / float(np.log(k)) if k > 1 else 1.0,
        "gini": _Sizes.of(Counter(count_K.tolist())).gini(),
        "top_share": float(count_K.max() / count_K.sum()),
    }


def _entropy(count: np.ndarray, times) -> float:
    """Entropy in nats of a table in which each of `count` stands so many `times`."""
    share = count / (count * times).sum()
    return float(max(-(times * share * np.log(share, out=np.zeros(len(share)), where=share > 0)).sum(), 0.0))


_AGREEMENT = ("purity", "purity_shuffled", "purity_products", "ami", "ami_shuffled")


def _agreement(prefix_N, category_N) -> dict:
    """Purity and AMI of prefixes, the same with shuffled categories, and the number of products with a category."""
    known = category_N >= 0
    prefix, category = prefix_N[known], category_N[known]
    if not len(prefix):
        return dict.fromkeys(_AGREEMENT, 0.0) | {"purity_products": 0}
    rng = np.random.default_rng(SHUFFLE_SEED)
    shuffled = rng.permutation(category)
    part = slice(None) if len(prefix) <= AMI_ROWS else rng.choice(len(prefix), AMI_ROWS, replace=False)
    return {
        "purity": _purity_of(prefix, category),
        "purity_shuffled": _purity_of(prefix, shuffled),
        "purity_products": len(prefix),
        "ami": float(adjusted_mutual_info_score(category[part], prefix[part])),
        "ami_shuffled": float(adjusted_mutual_info_score(shuffled[part], prefix[part])),
    }


def _purity_of(prefix, category) -> float:
    """Sum over prefixes of the count of its commonest category, over all products."""
    _, prefix = np.unique(prefix, return_inverse=True)
    pair, count = np.unique(prefix * (int(category.max()) + 1) + category, return_counts=True)
    _, first = np.unique(pair // (int(category.max()) + 1), return_index=True)
    return float(np.maximum.reduceat(count, first).sum() / len(prefix))


def prefix_agreement(codes_NL, category_NH, *, pairs=200_000, seed=0) -> dict:
    """Mean number of tokens that two products' IDs share from the left, within a category and across (section 4.8).

    `codes_NL` integers N×L; `category_NH` integers N×H, −1 = no category at that depth. At each depth `pairs` seeded
    pairs are drawn with replacement, each pair of different products of one category (of two categories) equally
    likely; the standard error is at most L / (2·√pairs) tokens. Returns lists over depths: `within`, `across`, in
    tokens, None where there is no such pair. Raises InputError for tables of unequal length.
    """
    codes_NL, category_NH = np.asarray(codes_NL), np.asarray(category_NH)
    if codes_NL.ndim != 2 or category_NH.ndim != 2 or len(codes_NL) != len(category_NH):
        raise InputError(
            f"codes N×L and categories N×H must have the same rows, found {codes_NL.shape} and {category_NH.shape}"
        )
    rng, within, across = np.random.default_rng(seed), [], []
    for category_N in category_NH.T:
        known = np.flatnonzero(category_N >= 0)
        _, group, size = np.unique(category_N[known], return_inverse=True, return_counts=True)
        row_N = known[np.argsort(group, kind="stable")]
        size_N = np.repeat(size, size)
        start_N = np.repeat(np.cumsum(size) - size, size)
        within.append(_mean_common_prefix(codes_NL, row_N, start_N, size_N, size_N - 1, pairs, rng))
        end_N = start_N + size_N
        across.append(_mean_common_prefix(codes_NL, row_N, end_N, len(row_N), len(row_N) - size_N, pairs, rng))
    return {"pairs": int(pairs), "within": within, "across": across}


def _mean_common_prefix(codes_NL, row_N, start_N, cycle, partners_N, pairs, rng) -> float | None:
    """Mean over drawn pairs; product n of the order `row_N` (sorted by category) has `partners_N[n]` partners.

    Within a category they are the other rows of its block, counted round from its own place; across, the rows after
    its block, counted round the whole table.
    """
    total_N = np.cumsum(partners_N)
    if not len(total_N) or total_N[-1] == 0:
        return None
    draw_P = rng.integers(0, total_N[-1], pairs)
    first_P = np.searchsorted(total_N, draw_P, side="right")
    step_P = total_N[first_P] - draw_P  # 1 … partners
    if np.ndim(cycle):  # within: count on from the product's own place in its block
        own_P = first_P - start_N[first_P]
        second_P = start_N[first_P] + (own_P + step_P) % cycle[first_P]
    else:
        second_P = (start_N[first_P] + step_P - 1) % cycle
    equal_PL = codes_NL[row_N[first_P]] == codes_NL[row_N[second_P]]
    return float(np.logical_and.accumulate(equal_PL, axis=1).sum(axis=1).mean())


def neighbour_agreement(codes_NL, embedding_ND, *, neighbours=10, sample=2_000, seed=0) -> dict:
    """Share of a product's nearest embeddings whose IDs begin with its first 1, 2, 3 tokens.

    `codes_NL` integers N×L, `embedding_ND` floats. Nearest by cosine, exact, over all N products but itself; equal
    embeddings count as neighbours; a row of zeros has cosine 0 with all. Queries are a seeded sample of `sample`
    products. `share_random` is the same for as many products drawn at random. Returns `queries`, `neighbours` (fewer
    in a catalogue that has fewer) and the lists `share`, `share_random` over the first min(3, L) tokens, of None when
    there is but one product. Raises InputError for tables of unequal length.
    """
    codes_NL, embedding_ND = _same_rows(
        np.asarray(codes_NL), np.asarray(embedding_ND, np.float32), "codes", "embeddings"
    )
    total, width = len(codes_NL), min(3, codes_NL.shape[1])
    neighbours, rng = min(neighbours, total - 1), np.random.default_rng(seed)
    query_Q = np.sort(rng.choice(total, min(sample, total), replace=False))
    counts = {"queries": len(query_Q), "neighbours": max(neighbours, 0)}
    if neighbours < 1:
        return counts | {"share": [None] * width, "share_random": [None] * width}
    norm_N = np.sqrt(np.einsum("nd,nd->n", embedding_ND, embedding_ND, dtype=np.float64)).astype(np.float32)
    inverse_N = np.divide(1, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)
    near_QM = np.empty((len(query_Q), neighbours), np.int64)
    block = max(1, _BLOCK_NUMBERS // total)
    for begin in range(0, len(query_Q), block):
        rows_B = query_Q[begin : begin + block]
        cosine_BN = embedding_ND[rows_B] @ embedding_ND.T
        cosine_BN *= inverse_N  # the query's own norm changes no order
        cosine_BN[np.arange(len(rows_B)), rows_B] = -np.inf
        near_QM[begin : begin + block] = np.argpartition(cosine_BN, -neighbours, axis=1)[:, -neighbours:]
    random_QM = rng.integers(0, total - 1, near_QM.shape)
    random_QM += random_QM >= query_Q[:, None]
    shares = {"share": near_QM, "share_random": random_QM}
    return counts | {name: _shared_tokens(codes_NL[:, :width], query_Q, other) for name, other in shares.items()}


def _shared_tokens(codes_NL, query_Q, other_QM) -> list[float]:
    equal_QML = codes_NL[other_QM] == codes_NL[query_Q][:, None]
    return np.logical_and.accumulate(equal_QML, axis=2).mean(axis=(0, 1)).tolist()


def displacement_of(cost, products: int) -> dict:
    """What de-duplication changed: `moved_share` of all products, and the added squared distance of those moved, from the
    `cost` of the latter (`collisions.UniqueIds`), an array. `mean_cost`, `median_cost`, `p95_cost` are None when none moved,
    `moved_share` is None for an empty table.
    """
    return {
        "moved_share": len(cost) / products if products else None,
        "mean_cost": float(cost.mean()) if len(cost) else None,
        "median_cost": float(np.median(cost)) if len(cost) else None,
        "p95_cost": float(np.percentile(cost, 95)) if len(cost) else None,
    }


def reconstruction_error(embedding_ND, reconstruction_ND) -> dict:
    """How far the decoded embedding lies from the true one: means over rows.

    `squared_error`, ‖e − ê‖² summed over dimensions; `relative_error`, the same divided by the mean squared distance of
    the embeddings from their mean, so that 1 = no better than a constant (None when all embeddings are equal);
    `cosine`, of the rows where neither is zero (None without any). Raises InputError for unequal shapes or no rows.
    """
    true_ND, decoded_ND = np.asarray(embedding_ND, np.float64), np.asarray(reconstruction_ND, np.float64)
    if true_ND.ndim != 2 or true_ND.shape != decoded_ND.shape or not len(true_ND):
        raise InputError(
            f"embeddings and reconstructions must be arrays N×D of one shape with rows, found {true_ND.shape} and "
            f"{decoded_ND.shape}"
        )
    error = float(((true_ND - decoded_ND) ** 2).sum(axis=1).mean())
    spread = float(true_ND.var(axis=0).sum())
    norm_N = np.linalg.norm(true_ND, axis=1) * np.linalg.norm(decoded_ND, axis=1)
    cosine = (true_ND * decoded_ND).sum(axis=1)[norm_N > 0] / norm_N[norm_N > 0]
    return {
        "squared_error": error,
        "relative_error": error / spread if spread > 0 else None,
        "cosine": float(cosine.mean()) if len(cosine) else None,
    }


def hourglass(normalised_entropy_L, *, tolerance=HOURGLASS_TOLERANCE) -> dict:
    """Is an inner level used more narrowly than both its neighbours (2407.21488; METHODS 8.4)?

    `normalised_entropy_L`: the list of `id_quality`, 0…1. Returns lists over levels, `dent`, by how much the lower
    neighbour's entropy is above the level's own (0 at the first and last level, and where it is not), and `narrow`,
    dent > tolerance; `hourglass`, whether any is; `level`, the letter of the deepest dent among the narrow, or None.
    """
    entropy_L = np.asarray(normalised_entropy_L, np.float64)
    dent_L = np.zeros(len(entropy_L))
    if len(entropy_L) > 2:
        dent_L[1:-1] = np.maximum(np.minimum(entropy_L[:-2], entropy_L[2:]) - entropy_L[1:-1], 0.0)
    narrow_L = dent_L > tolerance
    return {
        "hourglass": bool(narrow_L.any()),
        "level": LEVEL_LETTERS[int(dent_L.argmax())] if narrow_L.any() else None,
        "dent": dent_L.tolist(),
        "narrow": narrow_L.tolist(),
        "tolerance": float(tolerance),
    }


def prefix_words(words_N, codes_NL, *, prefixes=6, terms=8) -> list[dict]:
    """The words that mark the fullest first-level codes, for the paper's Figure 6.

    `words_N`: N sets of words, one a title. Words are ranked by the z-score of their log-odds against all other
    products, with the whole catalogue as prior (Monroe, Colaresi and Quinn 2008, eqs. 16 and 22); those of one title
    only are passed over where there are others. Returns at most `prefixes` dicts, the fullest first: `code`,
    `products`, and lists of at most `terms`: `words`, `share` of the code's titles, share `elsewhere`.
    """
    words_N, codes_NL = _same_rows(words_N, np.asarray(codes_NL), "titles and their words", "codes")
    code, products = np.unique(codes_NL[:, 0], return_counts=True)
    fullest = np.argsort(-products, kind="stable")[:prefixes]
    inside, total = {int(code[index]): Counter() for index in fullest}, Counter()
    for words, first in zip(words_N, codes_NL[:, 0].tolist()):
        total.update(words)
        if first in inside:
            inside[first].update(words)
    marks = []
    for (first, here), size in zip(inside.items(), products[fullest].tolist()):
        chosen, others = _characteristic(here, total, terms), max(len(words_N) - size, 1)
        share = {"share": [here[word] / size for word in chosen]}
        share["elsewhere"] = [(total[word] - here[word]) / others for word in chosen]
        marks.append({"code": first, "products": size, "words": chosen, **share})
    return marks


def _characteristic(inside: Counter, total: Counter, terms: int) -> list[str]:
    """Words with the highest z of log-odds; a word's prior is its count in the whole catalogue."""
    words = sorted([word for word, count in inside.items() if count > 1] or inside)
    here, prior = (np.array([counts[word] for word in words], float) for counts in (inside, total))
    there, sum_here, sum_all = prior - here, sum(inside.values()), sum(total.values())
    rest_here, rest_there = sum_here + sum_all - here - prior, 2 * sum_all - sum_here - there - prior
    odds_here, odds_there = (here + prior) / rest_here.clip(1e-9), (there + prior) / rest_there.clip(1e-9)
    score = np.log(odds_here / odds_there) / np.sqrt(1 / (here + prior) + 1 / (there + prior))
    return [words[index] for index in np.argsort(-score, kind="stable")[:terms] if score[index] > 0]


def _same_rows(first, second, first_name, second_name):
    if len(first) != len(second):
        raise InputError(
            f"{first_name} and {second_name} must have the same rows, found {len(first)} and {len(second)}"
        )
    return first, second
