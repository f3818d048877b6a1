"""A user before the query: attributes, the IDs of the products looked at last, then the query as it was.

CQ-SID (2605.14434, stage 3) trains and asks so. Training and search make their inputs here, so that what is asked is what was
taught. No import of transformers, which a replica does without.

B rows, A tokens of attributes, Q tokens of the query, R recent products in all, P of a row, L levels, W tokens of an input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.vocabulary import Cut, bare_words, frame


class User(NamedTuple):
    """Who asks. `attributes`: texts such as "age 20-29", as the training pairs have them; `recent`: product_ids that they looked
    at before, the latest last."""

    attributes: tuple[str, ...] = ()
    recent: tuple[str, ...] = ()


class Reading(NamedTuple):
    """What a generator reads of a user: at most `tokens` of attributes, and the IDs of the `recent` latest products."""

    tokens: int
    recent: int


def user_width(query_tokens: int, *, attribute_tokens: int, recent: int, levels: int) -> int:
    """Tokens of an input with a user before its query."""
    return query_tokens + attribute_tokens + recent * levels


def latest(row_R: np.ndarray, rows: int, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept_R bool, place_R int64): the last `most` entries of each row and their place 0 … `most` − 1 among these.

    `row_R` ascends; entries of a row are in their order, the latest last.
    """
    count_B = np.bincount(row_R, minlength=rows)
    place_R = np.arange(len(row_R)) - (np.cumsum(count_B) - count_B)[row_R] - np.maximum(count_B - most, 0)[row_R]
    return place_R >= 0, place_R


def with_users(
    tokenizer,
    query_BQ: np.ndarray,
    attributes: Sequence[str],
    row_R: np.ndarray,
    codes_RL: np.ndarray,
    *,
    space: DocidSpace,
    attribute_tokens: int,
    recent: int,
) -> Cut:
    """int32 B×W: attributes (cut to `attribute_tokens`), the IDs of the `recent` latest products, the query as it was; and
    whose attributes were cut.

    `query_BQ`: inputs as `tokenize` gives them. `attributes`: a text per row, "" where there are none. `row_R` ascending
    with `codes_RL` the IDs of each row's recent products, the latest last. The tokenizer's last entries must be the ID
    tokens of `space`. Raises InputError where they are not. (CQ-SID, 2605.14434, stage 3: gender, age band and the semantic
    IDs of recent clicks before the query.)
    """
    base = len(tokenizer) - sum(space.codes_per_level)
    if recent and tokenizer.convert_tokens_to_ids(space.tokens()[0]) != base:
        raise InputError(
            "the tokenizer's last entries are not the ID tokens of these levels: recent products need a model that reads "
            "ID tokens; set user_recent to 0"
        )
    before, _ = frame(tokenizer)
    rows, pad = len(query_BQ), tokenizer.pad_token_id
    words_BA = bare_words(tokenizer, attributes, length=attribute_tokens + 1)
    cut_B, words_BA = words_BA[:, -1] != pad, words_BA[:, :-1]
    first_L = base + np.cumsum((0, *space.codes_per_level[:-1]))
    ids_BPL = np.full((rows, recent, space.levels), pad, np.int32)
    kept_R, place_R = latest(row_R, rows, most=recent)
    ids_BPL[row_R[kept_R], place_R[kept_R]] = space.check(codes_RL)[kept_R] + first_L
    head_BQ, tail_BQ = query_BQ[:, : len(before)], query_BQ[:, len(before) :]
    whole_BW = np.concatenate((head_BQ, words_BA, ids_BPL.reshape(rows, recent * space.levels), tail_BQ), axis=1)
    order_BW = np.argsort(whole_BW == pad, axis=1, kind="stable")
    return Cut(np.take_along_axis(whole_BW, order_BW, 1).astype(np.int32), cut_B)
