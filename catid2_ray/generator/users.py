"""A user before the query: attributes as words, then the IDs of the products that they looked at last, as ID tokens.

(CQ-SID, 2605.14434, stage 3: gender, age band and the semantic IDs of recent clicks before the query.)

B rows, A tokens of attributes, Q tokens of the query, R recent products in all, P of a row, L levels, W tokens of an input.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.examples import Cut
from catid2_ray.generator.vocabulary import frame


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
    tokenizer: PreTrainedTokenizerFast,
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
    tokens of `space`. Raises InputError where they are not.
    """
    base = len(tokenizer) - sum(space.codes_per_level)
    if recent and tokenizer.convert_tokens_to_ids(space.tokens()[0]) != base:
        raise InputError(
            "the tokenizer's last entries are not the ID tokens of these levels: recent products need a model that reads "
            "ID tokens; set user_recent to 0"
        )
    before, _ = frame(tokenizer)
    rows, pad = len(query_BQ), tokenizer.pad_token_id
    words_BA = np.full((rows, attribute_tokens + 1), pad, np.int32)
    if rows:
        words_BA[:] = tokenizer(
            list(attributes), add_special_tokens=False, split_special_tokens=True, max_length=attribute_tokens + 1,
            truncation=True, padding="max_length", padding_side="right", return_attention_mask=False,
        )["input_ids"]  # fmt: skip
    cut_B, words_BA = words_BA[:, -1] != pad, words_BA[:, :-1]
    first_L = base + np.cumsum((0, *space.codes_per_level[:-1]))
    ids_BPL = np.full((rows, recent, space.levels), pad, np.int32)
    kept_R, place_R = latest(row_R, rows, most=recent)
    ids_BPL[row_R[kept_R], place_R[kept_R]] = space.check(codes_RL)[kept_R] + first_L
    head_BQ, tail_BQ = query_BQ[:, : len(before)], query_BQ[:, len(before) :]
    whole_BW = np.concatenate((head_BQ, words_BA, ids_BPL.reshape(rows, recent * space.levels), tail_BQ), axis=1)
    order_BW = np.argsort(whole_BW == pad, axis=1, kind="stable")
    return Cut(np.take_along_axis(whole_BW, order_BW, 1).astype(np.int32), cut_B)
