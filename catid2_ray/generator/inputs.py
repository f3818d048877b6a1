"""Inputs beside plain queries and titles: pieces of descriptions, and queries that a model makes up. `users.py` has a third kind.

N rows, T tokens of an input, S spans, C all tokens of all descriptions end to end.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from catid2_ray.errors import EncoderError, InputError
from catid2_ray.generator.vocabulary import frame
from catid2_ray.hashing import uniform
from catid2_ray.schedule import seed_from

SHORTEST = 4  # tokens; below, a description says nothing about its product
_CHUNK = 4096  # descriptions that are tokenized together


class Spans(NamedTuple):
    """`input_ids_ST` int32, padded at the end; `row_S`: the product of each, ascending; `too_short`: products without one."""

    input_ids_ST: np.ndarray
    row_S: np.ndarray
    too_short: int


def span_places(length_N: np.ndarray, key_N: np.ndarray, *, tokens: int, windows: int, seed: int):
    """(row_S, start_S) int64: where the spans of texts of `length_N` tokens begin; the first of each text at 0.

    A text longer than `tokens` has up to `windows` more, one drawn in each of as many equal stretches of the places that
    are left, so that they are distinct and lie over the whole text. Texts under SHORTEST tokens have none.
    """
    length_N = np.asarray(length_N)
    room_N = np.where(length_N >= SHORTEST, np.maximum(length_N - tokens, 0), 0)
    more_N = np.minimum(room_N, windows)
    row_S, start_S = [np.flatnonzero(length_N >= SHORTEST)], []
    start_S.append(np.zeros(len(row_S[0]), np.int64))
    for number in range(windows):
        row_W = np.flatnonzero(more_N > number)
        room_W, more_W = room_N[row_W], more_N[row_W]
        first_W, end_W = number * room_W // more_W, (number + 1) * room_W // more_W
        row_S.append(row_W)
        start_S.append(1 + first_W + np.floor(uniform(key_N[row_W], seed, number) * (end_W - first_W)).astype(np.int64))
    rows, starts = np.concatenate(row_S), np.concatenate(start_S)
    order = np.argsort(rows, kind="stable")
    return rows[order], starts[order]


def description_spans(
    tokenizer: PreTrainedTokenizerFast,
    descriptions: Sequence[str | None],
    key_N: np.ndarray,
    *,
    tokens: int,
    windows: int,
    length: int,
    seed: int,
) -> Spans:
    """Inputs of `length` tokens from N descriptions (None or empty: none); `key_N` uint64 tells the products apart.

    As DSI (2202.06991) has it the first tokens of a document, as NCI (2206.02743, section 3.2) has it windows at random beside
    them. Which windows is a pure function of (seed, product): it does not depend on the other products, nor on parts.

    A span has at most `tokens` tokens of text. Raises InputError where these and the tokenizer's own marks exceed `length`.
    """
    before, after = frame(tokenizer)
    marks = len(before) + len(after)
    if tokens < 1 or tokens + marks > length:
        raise InputError(f"spans of {tokens} tokens and {marks} marks do not fit inputs of {length}; lower span_tokens")
    parts = []
    for start in range(0, len(descriptions), _CHUNK):
        texts = [text or "" for text in descriptions[start : start + _CHUNK]]
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]  # fmt: skip
        length_N = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat_C = np.fromiter(chain.from_iterable(encoded), np.int32, int(length_N.sum()))
        row_S, start_S = span_places(length_N, key_N[start : start + _CHUNK], tokens=tokens, windows=windows, seed=seed)
        end_S = np.minimum(start_S + tokens, length_N[row_S])
        place_ST = (start_S + np.cumsum(length_N)[row_S] - length_N[row_S])[:, None] + np.arange(tokens)
        inside_ST = np.arange(tokens) < (end_S - start_S)[:, None]
        ids_ST = np.full((len(row_S), length), tokenizer.pad_token_id, np.int32)
        ids_ST[:, : len(before)] = before
        row_I, place_I = np.nonzero(inside_ST)
        ids_ST[row_I, len(before) + place_I] = flat_C[place_ST[inside_ST]]
        for number, mark in enumerate(after):
            ids_ST[np.arange(len(row_S)), len(before) + end_S - start_S + number] = mark
        parts.append(Spans(ids_ST, row_S + start, int((length_N < SHORTEST).sum())))
    if not parts:
        return Spans(np.zeros((0, length), np.int32), np.zeros(0, np.int64), 0)
    return Spans(
        np.concatenate([part.input_ids_ST for part in parts]),
        np.concatenate([part.row_S for part in parts]),
        sum(part.too_short for part in parts),
    )


class Doc2Query:
    """A seq2seq model by hub id or folder that makes up queries for titles (docT5query, as NCI trains on, section 3.2).

    Sampled, not searched, since several different queries of a title are wanted. What is drawn depends on the seed and on the
    batch that a title is in: on the place and the titles of the batch. Raises EncoderError when it cannot be loaded."""

    def __init__(self, name_or_folder: str, *, input_tokens: int = 64, output_tokens: int = 24, top_k: int = 10, batch: int = 64,
                 device: str = "cpu"):  # fmt: skip
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_pretrained(name_or_folder, trust_remote_code=False)
            self.model = model.eval().to(device)
        except Exception as error:
            raise EncoderError(
                f"no seq2seq model for synthetic queries could be loaded from {str(name_or_folder)!r} "
                f"({type(error).__name__}: {error}); give a folder written by save_pretrained or a hub id that can be "
                "reached in generator.doc2query, or set mix.synthetic to 0"
            ) from error
        self.input_tokens, self.output_tokens, self.top_k, self.batch = input_tokens, output_tokens, top_k, batch

    @torch.inference_mode()
    def queries(self, titles: Sequence[str], *, count: int, seed: int) -> list[str]:
        """`count` queries for each title, those of a title together; "" where the model had nothing to say."""
        queries, device = [], self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for start in range(0, len(titles), self.batch):
                inputs = self.tokenizer(
                    list(titles[start : start + self.batch]), padding=True, truncation=True, max_length=self.input_tokens,
                    return_tensors="pt",
                )  # fmt: skip
                torch.manual_seed(seed_from(seed, start))
                ids = self.model.generate(
                    input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                    do_sample=True, top_k=self.top_k, num_beams=1, num_return_sequences=count,
                    max_new_tokens=self.output_tokens,
                )  # fmt: skip
                queries += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return queries
