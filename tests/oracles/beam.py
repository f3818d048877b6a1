"""Slow, obvious searches over IDs: every ID scored by full forward passes, and a beam in plain Python lists.

Neither uses a trie, a cache or batching; `generate` with a dictionary trie stands in for what others do. Two models
that are no T5, with known answers, stand behind the search's protocol.
"""

import math

import numpy as np
import torch
from transformers import T5ForConditionalGeneration


def step_logp(
    model: T5ForConditionalGeneration, query_T, codes, *, codes_per_level, normalize: str, ids=()
) -> list[float]:
    """log p of every next code after the codes `codes`, by one uncached forward pass; `ids`: of the trie, where `normalize` is
    "trie" and all other codes have −inf."""
    first, level = len(model.lm_head.weight) - sum(codes_per_level), len(codes)
    offsets = [first + sum(codes_per_level[:i]) for i in range(len(codes_per_level))]
    decoder_ids = torch.tensor([[0, *(offset + int(code) for offset, code in zip(offsets, codes))]])
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([query_T]), decoder_input_ids=decoder_ids).logits[0, -1].double()
    mine = slice(offsets[level], offsets[level] + codes_per_level[level])
    if normalize == "level":
        return logits_V[mine].log_softmax(0).tolist()
    if normalize == "trie":
        return over_children(logits_V[mine].tolist(), codes, ids)
    return logits_V.log_softmax(0)[mine].tolist()


def over_children(logits, prefix, ids) -> list[float]:
    """log p of each code among those that some ID has after `prefix`, −inf of the others."""
    children = sorted({docid[len(prefix)] for docid in map(tuple, ids) if docid[: len(prefix)] == tuple(prefix)})
    total = math.log(sum(math.exp(logits[code]) for code in children)) if children else 0.0
    return [logit - total if code in children else -math.inf for code, logit in enumerate(logits)]


def brute_force(
    model, ids, query_T, *, codes_per_level, normalize: str, trie=None
) -> list[tuple[float, tuple[int, ...]]]:
    """(logp, ID) of every ID, best first, equal scores by ID. `trie`: the IDs that are compared where `normalize` is "trie", if
    they are more than `ids`."""
    scored, trie = [], np.asarray(ids if trie is None else trie).tolist()
    for docid in sorted({tuple(map(int, docid)) for docid in ids}):
        logp = 0.0
        for level, code in enumerate(docid):
            steps = step_logp(
                model, query_T, docid[:level], codes_per_level=codes_per_level, normalize=normalize, ids=trie
            )
            logp += steps[code]
        scored.append((logp, docid))
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def slow_beam(
    model, ids, query_T, *, codes_per_level, widths, normalize: str, trie=None
) -> list[tuple[float, tuple[int, ...]]]:
    """`beam_of_lists` with a T5's scores; `trie` as in `brute_force`."""
    trie = np.asarray(ids if trie is None else trie).tolist()

    def steps(prefix):
        return step_logp(model, query_T, prefix, codes_per_level=codes_per_level, normalize=normalize, ids=trie)

    return beam_of_lists(steps, ids, widths)


def beam_of_lists(step_logp, ids, widths) -> list[tuple[float, tuple[int, ...]]]:
    """(logp, ID) of the last beam, best first: at each level the best `widths[level]` prefixes of any ID in `ids`.

    `step_logp(prefix)` gives log p of every next code after a prefix.
    """
    ids = {tuple(map(int, docid)) for docid in ids}
    beams = [(0.0, ())]
    for level, width in enumerate(widths):
        grown = []
        for logp, prefix in beams:
            steps = step_logp(prefix)
            for code in sorted({docid[level] for docid in ids if docid[:level] == prefix}):
                grown.append((logp + steps[code], (*prefix, code)))
        beams = sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:width]
    return beams


def hugging_face(model, ids, input_ids_BT, attention_mask_BT, *, codes_per_level, beams: int):
    """`generate` under a dictionary trie: (codes B×beams×L, scores B×beams)."""
    first = len(model.lm_head.weight) - sum(codes_per_level)
    offsets = torch.tensor([first + sum(codes_per_level[:i]) for i in range(len(codes_per_level))])
    children = {}
    for docid in ids:
        tokens = [int(offset) + int(code) for offset, code in zip(offsets, docid)]
        for level, token in enumerate(tokens):
            children.setdefault(tuple(tokens[:level]), set()).add(token)
    answer = model.generate(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=len(codes_per_level),
        length_penalty=0.0,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, tokens: sorted(children[tuple(tokens.tolist()[1:])]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = answer.sequences[:, 1:] - offsets
    return codes.view(len(input_ids_BT), beams, -1), answer.sequences_scores.view(len(input_ids_BT), beams)


class Table:
    """A decoder without a network: the logits of each prefix are given, as a table; words beside the codes weigh 1."""

    device = torch.device("cpu")

    def __init__(self, codes_per_level, queries, seed):
        random = np.random.default_rng(seed)
        self.codes_per_level = tuple(codes_per_level)
        self.logits = [
            torch.from_numpy(random.normal(size=(queries, *codes_per_level[: level + 1]))).float()
            for level in range(len(codes_per_level))
        ]

    def encode(self, input_ids_BT, attention_mask_BT):
        return None

    def decode_step(self, level, memory, cache, parent_BM, code_BM):
        return torch.zeros(*code_BM.shape, 1), None

    def level_logits(self, level, hidden_BMD, prefix_BML):
        query_B1 = torch.arange(len(prefix_BML))[:, None]
        return self.logits[level][(query_B1, *prefix_BML.unbind(-1))].expand(-1, prefix_BML.shape[1], -1)

    def log_partition(self, level, hidden_BMD, prefix_BML):
        return torch.logaddexp(self.level_logits(level, hidden_BMD, prefix_BML).logsumexp(-1), torch.zeros(()))

    def step_logp(self, query, prefix, normalize):
        logits = self.logits[len(prefix)][(query, *prefix)].double()
        total = logits.exp().sum() + (1 if normalize == "vocabulary" else 0)
        return (logits - total.log()).tolist()


class Recurrent:
    """A decoder-only toy: one state per beam, the sum of what was read, query tokens first, each times its position."""

    device = torch.device("cpu")

    def __init__(self, codes_per_level, words, seed):
        generator = torch.Generator().manual_seed(seed)
        self.word_VD = torch.randn(words, 6, generator=generator)
        self.code_LKD = torch.randn(len(codes_per_level), max(codes_per_level), 6, generator=generator)
        self.codes_per_level = codes_per_level

    def encode(self, input_ids_BT, attention_mask_BT):
        return (self.word_VD[input_ids_BT] * attention_mask_BT[..., None]).sum(1, keepdim=True)

    def decode_step(self, level, memory, cache, parent_BM, code_BM):
        if level == 0:
            return memory, memory
        past_BMD = cache.gather(1, parent_BM[..., None].expand(-1, -1, cache.shape[-1]))
        state_BMD = past_BMD + level * self.code_LKD[level - 1][code_BM]
        return state_BMD, state_BMD

    def level_logits(self, level, hidden_BMD, prefix_BML):
        return hidden_BMD.tanh() @ self.code_LKD[level, : self.codes_per_level[level]].T

    def log_partition(self, level, hidden_BMD, prefix_BML):
        return self.level_logits(level, hidden_BMD, prefix_BML).logsumexp(-1)

    def step_logp(self, tokens, prefix):
        state_D = sum(self.word_VD[token] for token in tokens)
        for position, code in enumerate(prefix):
            state_D = state_D + (position + 1) * self.code_LKD[position, code]
        level = len(prefix)
        return (self.code_LKD[level, : self.codes_per_level[level]] @ state_D.tanh()).log_softmax(0).tolist()
