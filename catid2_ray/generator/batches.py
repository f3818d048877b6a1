"""Which rows make up step s: examples mixed and shuffled by epoch, titles thinned into pseudo-queries, texts of like length.

A batch is a pure function of (seed, step), drawn for all workers at once and then cut by rank, so resuming and
changing the number of workers leave the stream of examples as it was.

B batch, T tokens, V vocabulary, L levels, N rows or distinct lengths, G groups.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.states import StateCache, TokenStates
from catid2_ray.generator.vocabulary import EOS, PAD

MOST_PADDING = 0.1  # share of the tokens of a batch that may be padding
FROM_PAIRS = ("query", "user", "teacher")  # kinds of examples that are made of pairs


def kept_words(
    input_ids_BT: np.ndarray,
    starts_word_V: np.ndarray,
    *,
    keep: float,
    generator: np.random.Generator,
    pad: int = PAD,
    special: Sequence[int] = (EOS,),
) -> np.ndarray:
    """bool B×T: which tokens stay when each word stays with probability `keep`, at least one word per row.

    Turns a title into something like a query, in the spirit of NCI's generated queries (Wang et al. 2022, section 3.2),
    without a second model. Whole words fall, never parts of one. Tokens in `special` always stay ([CLS] and [SEP] too);
    padding never does.
    """
    if not 0.0 < keep <= 1.0:
        raise RecipeError(f"keep must be in (0, 1], found {keep}")
    special_BT = np.isin(input_ids_BT, list(special))
    real_BT = (input_ids_BT != pad) & ~special_BT
    begins_BT = real_BT & np.asarray(starts_word_V)[input_ids_BT]
    # A text cut by truncation, or led by an unknown character, may begin inside a word.
    row_B, first_B = np.arange(len(real_BT)), real_BT.argmax(1)
    begins_BT[row_B, first_B] |= real_BT[row_B, first_B]
    word_BT = np.cumsum(begins_BT, axis=1) - 1
    draw_BT = generator.random(input_ids_BT.shape)
    draw_BT[np.arange(input_ids_BT.shape[1]) >= word_BT[:, -1:] + 1] = 2.0
    kept_word_BT = draw_BT < keep
    kept_word_BT[row_B, draw_BT.argmin(1)] = True
    return (real_BT & np.take_along_axis(kept_word_BT, np.maximum(word_BT, 0), 1)) | (
        special_BT & (input_ids_BT != pad)
    )


def only_kept(input_ids_BT: np.ndarray, kept_BT: np.ndarray, *, pad: int = PAD) -> np.ndarray:
    """int32 B×T': the tokens that are kept, moved to the left, with no column of only padding."""
    used = max(1, int(kept_BT.sum(1).max(initial=0)))
    order_BT = np.argsort(~kept_BT, axis=1, kind="stable")[:, :used]
    return np.take_along_axis(np.where(kept_BT, input_ids_BT, pad), order_BT, 1).astype(np.int32)


class EpochOrder(NamedTuple):
    """`kind_N`: index into `kinds`; `row_N`: row of that kind's table."""

    kinds: tuple[str, ...]
    kind_N: np.ndarray
    row_N: np.ndarray


def epoch_order(sizes: Mapping[str, int], ratio: Mapping[str, float], *, seed: int, epoch: int) -> EpochOrder:
    """The shuffled rows of one epoch; kind k appears round(ratio[k] · sizes[k]) times.

    Fractions walk through a fixed permutation epoch after epoch, so over the epochs every row is used equally often.
    A pure function of its arguments. Raises RecipeError for an unknown kind, a negative ratio, or an empty epoch.
    """
    kinds = tuple(sorted(sizes))
    unknown = set(ratio) - set(sizes)
    if unknown or min(ratio.values(), default=0.0) < 0:
        raise RecipeError(f"example ratios {dict(ratio)} must be ≥ 0 and name only the kinds {list(kinds)}")
    rows = []
    for number, kind in enumerate(kinds):
        count = round(ratio.get(kind, 1.0) * sizes[kind])
        if count:
            fixed_N = np.random.default_rng((seed, 1, number)).permutation(sizes[kind])
            rows.append(fixed_N[(epoch * count + np.arange(count)) % sizes[kind]])
        else:
            rows.append(np.empty(0, np.int64))
    kind_N = np.repeat(np.arange(len(kinds), dtype=np.uint8), [len(row_N) for row_N in rows])
    if not len(kind_N):
        raise RecipeError(f"no training example: sizes {dict(sizes)} with ratios {dict(ratio)} leave an empty epoch")
    shuffle_N = np.random.default_rng((seed, 2, epoch)).permutation(len(kind_N))
    return EpochOrder(kinds, kind_N[shuffle_N], np.concatenate(rows)[shuffle_N])


def kinds_without_pairs(kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds of examples that a catalogue without a table of pairs has, of those that are asked for: titles at least."""
    return tuple(kind for kind in kinds if kind not in FROM_PAIRS) or ("title",)


def mix_ratios(sizes: Mapping[str, int], mix: Mapping[str, float]) -> dict[str, float]:
    """How often each kind's rows appear per epoch, where `mix` wants so many of them per row of "query".

    Kinds that `mix` does not name have 0. Without any query example, that is without pairs, what the mix wants of the other
    kinds counts per title (or per row of the largest kind), and where it wants none, titles are all there is. Raises
    RecipeError for a kind that is wanted but has no row.
    """
    unit = sizes.get("query", 0)
    if not unit:
        unit = sizes.get("title") or max(sizes.values(), default=0)
        mix = {kind: share for kind, share in mix.items() if share and kind not in FROM_PAIRS} or {"title": 1.0}
    absent = [kind for kind, share in mix.items() if share and not sizes.get(kind)]
    if absent:
        raise RecipeError(
            f"the mix wants {', '.join(absent)}, but there are no such examples (found {dict(sizes)}): take them out of the "
            "mix, or bring the data they are made of"
        )
    return {kind: mix.get(kind, 0.0) * unit / max(1, size) for kind, size in sizes.items()}


class Batch(NamedTuple):
    """`texts`: int32 ids B×T without a column of only padding, or a frozen encoder's states of them; `codes_BL` int64;
    `weight_B` float32, None where all count 1."""

    texts: np.ndarray | TokenStates
    codes_BL: np.ndarray
    weight_B: np.ndarray | None = None

    def inputs(self, device: torch.device) -> torch.Tensor | TokenStates:
        """What the loss takes: int64 B×T or states, on `device`."""
        if isinstance(self.texts, TokenStates):
            return TokenStates(*(part.to(device, non_blocking=True) for part in self.texts))
        return torch.from_numpy(self.texts).long().to(device)


@dataclass
class Examples:
    """Every example of a training run: per kind ("query", "title" …) an int32 N×T table of ids and the N×L codes.

    `ratio`: how often a kind's rows appear per epoch (1.0 where unnamed). `weight`: what each row of a kind counts in the loss
    (1 where unnamed). `drop_share` of the "title" rows of each batch lose words with probability 1 − `keep`; needs
    `starts_word_V`. Tables may be memory-mapped; all have one T. `pad`, `special`: the tokenizer's padding and the marks that
    never fall (`vocabulary.marks`). `states`: where the texts are read as token states, see `with_states`.
    """

    input_ids: Mapping[str, np.ndarray]
    codes: Mapping[str, np.ndarray]
    ratio: Mapping[str, float] = field(default_factory=dict)
    starts_word_V: np.ndarray | None = None
    keep: float = 0.5
    drop_share: float = 0.5
    pad: int = PAD
    special: tuple[int, ...] = (EOS,)
    weight: Mapping[str, np.ndarray] = field(default_factory=dict)
    states: StateCache | None = None
    _epochs: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for kind, ids_NT in self.input_ids.items():
            if kind not in self.codes or len(ids_NT) != len(self.codes[kind]):
                ids = len(self.codes[kind]) if kind in self.codes else "none"
                raise InputError(f"examples of kind {kind!r}: {len(ids_NT)} texts but {ids} IDs; they must go in pairs")
        if len({ids_NT.shape[1] for ids_NT in self.input_ids.values()}) != 1:
            raise InputError(
                f"tables differ in length: { {k: v.shape[1] for k, v in self.input_ids.items()} }; use one T"
            )

    def with_states(self, encoder, folder: str | os.PathLike, **settings) -> "Examples":
        """These rows in the same steps, and the same words fall, but read as the states of a frozen text encoder, which are
        cached in `folder`; `settings` as in `StateCache.build`."""
        ids_NT = np.concatenate([self.input_ids[kind] for kind in sorted(self.input_ids)])
        return replace(self, states=StateCache.build(encoder, ids_NT, folder, **settings), _epochs={})

    @property
    def sizes(self) -> dict[str, int]:
        return {kind: len(ids_NT) for kind, ids_NT in self.input_ids.items()}

    def steps_per_epoch(self, *, batch: int) -> int:
        """Whole batches of `batch` rows (all workers together) in one epoch; at least one."""
        return max(1, len(self._epoch(0, 0).kind_N) // batch)

    def _epoch(self, seed: int, epoch: int) -> EpochOrder:
        if (seed, epoch) not in self._epochs:
            self._epochs.clear()
            self._epochs[seed, epoch] = epoch_order(self.sizes, self.ratio, seed=seed, epoch=epoch)
        return self._epochs[seed, epoch]

    def batch(self, *, seed: int, step: int, batch: int, rank: int = 0, workers: int = 1) -> Batch:
        """The rows of `rank` in step `step`; `batch` counts all workers together. A pure function of its arguments."""
        if batch % workers:
            raise RecipeError(f"a batch of {batch} rows does not divide among {workers} workers")
        epoch, position = divmod(step, self.steps_per_epoch(batch=batch))
        order = self._epoch(seed, epoch)
        pick_B = (position * batch + np.arange(batch)) % len(order.kind_N)
        kind_B, row_B = order.kind_N[pick_B], order.row_N[pick_B]
        first = order.kinds[0]
        ids_BT = np.full((batch, self.input_ids[first].shape[1]), self.pad, np.int32)
        codes_BL = np.zeros((batch, self.codes[first].shape[1]), np.int64)
        kept_BT = np.zeros(ids_BT.shape, bool)
        weight_B = np.ones(batch, np.float32) if self.weight else None
        for number, kind in enumerate(order.kinds):
            here_B = np.flatnonzero(kind_B == number)
            if kind in self.weight:
                weight_B[here_B] = self.weight[kind][row_B[here_B]]
            ids_BT[here_B] = self.input_ids[kind][row_B[here_B]]
            codes_BL[here_B] = self.codes[kind][row_B[here_B]]
            kept_BT[here_B] = ids_BT[here_B] != self.pad
            if kind == "title" and self.starts_word_V is not None and self.drop_share > 0:
                generator = np.random.default_rng((seed, 3, step))
                thin_B = here_B[generator.random(len(here_B)) < self.drop_share]
                kept_BT[thin_B] = kept_words(
                    ids_BT[thin_B], self.starts_word_V, keep=self.keep, generator=generator, pad=self.pad,
                    special=self.special,
                )  # fmt: skip
        share = batch // workers
        mine = slice(rank * share, (rank + 1) * share)
        texts = only_kept(ids_BT[mine], kept_BT[mine], pad=self.pad)
        if self.states is not None:
            texts = self.states.take_texts(self.states.find(ids_BT[mine]), kept_BT[mine])
        return Batch(texts, codes_BL[mine], None if weight_B is None else weight_B[mine])


def length_groups(
    length_B: np.ndarray, *, least: int = 32, most: int = 8, padding: float = MOST_PADDING
) -> list[np.ndarray]:
    """Rows in as few groups as keep padding at or under the share `padding`, lengths ascending from group to group.

    Of all ways to cut the sorted lengths the one with least padding is found, by dynamic programming over the distinct lengths
    (at most as many as tokens fit an input), so the cost does not grow with the batch.
    `length_B`: tokens of each row. Groups have at least `least` rows (but for one group of all), as a pass over few rows
    costs as much as over many, and there are at most `most`. Where the goal cannot be reached so, the grouping with
    least padding is given. Rows of one length are never parted, so groups can be of unequal size. Rows keep their order
    inside a group.
    """
    length_B = np.maximum(np.asarray(length_B), 1)
    length_N, number_B, rows_N = np.unique(length_B, return_inverse=True, return_counts=True)
    before_N = np.concatenate(([0], np.cumsum(rows_N)))
    # cost_NN[i, j]: tokens of a group of the distinct lengths i … j, all padded to the last.
    size_NN = before_N[None, 1:] - before_N[:-1, None]
    cost_NN = np.where(size_NN >= least, size_NN * length_N[None, :], np.inf)
    cost_NN[0, -1] = len(length_B) * length_N[-1]
    real = int(length_B.sum())
    best_N, cuts = cost_NN[0], [np.zeros(len(length_N), np.int64)]
    least_cost, chosen = cost_NN[0, -1], 1
    for groups in range(2, min(most, len(length_N)) + 1):
        if 1.0 - real / least_cost <= padding:
            break
        # The last group begins at distinct length i, after the best cut of all shorter ones.
        through_NN = np.concatenate(([np.inf], best_N[:-1]))[:, None] + cost_NN
        cuts.append(through_NN.argmin(0))
        best_N = through_NN.min(0)
        if best_N[-1] < least_cost:
            least_cost, chosen = best_N[-1], groups
    group_N, end = np.zeros(len(length_N), np.int64), len(length_N)
    for group in range(chosen - 1, 0, -1):
        first = int(cuts[group][end - 1])
        group_N[first:end], end = group, first
    return [np.flatnonzero(group_N[number_B] == group) for group in range(chosen)]
