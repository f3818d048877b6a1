"""Slow, obvious searches over IDs: every ID scored by full forward passes, and a beam in plain Python lists.

Neither uses a trie, a cache or batching; `generate` with a dictionary trie stands in for what others do.
"""

import torch
from transformers import T5ForConditionalGeneration


def step_logp(model: T5ForConditionalGeneration, query_T, codes, *, codes_per_level, normalize: str) -> list[float]:
    """log p of every next code after the codes `codes`, by one uncached forward pass."""
    first, level = len(model.lm_head.weight) - sum(codes_per_level), len(codes)
    offsets = [first + sum(codes_per_level[:i]) for i in range(len(codes_per_level))]
    decoder_ids = torch.tensor([[0, *(offset + int(code) for offset, code in zip(offsets, codes))]])
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([query_T]), decoder_input_ids=decoder_ids).logits[0, -1].double()
    mine = slice(offsets[level], offsets[level] + codes_per_level[level])
    if normalize == "level":
        return logits_V[mine].log_softmax(0).tolist()
    return logits_V.log_softmax(0)[mine].tolist()


def brute_force(model, ids, query_T, *, codes_per_level, normalize: str) -> list[tuple[float, tuple[int, ...]]]:
    """(logp, ID) of every ID, best first, equal scores by ID."""
    scored = []
    for docid in sorted({tuple(map(int, docid)) for docid in ids}):
        logp = 0.0
        for level, code in enumerate(docid):
            steps = step_logp(model, query_T, docid[:level], codes_per_level=codes_per_level, normalize=normalize)
            logp += steps[code]
        scored.append((logp, docid))
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def slow_beam(model, ids, query_T, *, codes_per_level, widths, normalize: str) -> list[tuple[float, tuple[int, ...]]]:
    """(logp, ID) of the last beam, best first: at each level the best `widths[level]` prefixes of any ID in `ids`."""
    ids = {tuple(map(int, docid)) for docid in ids}
    beams = [(0.0, ())]
    for level, width in enumerate(widths):
        grown = []
        for logp, prefix in beams:
            steps = step_logp(model, query_T, prefix, codes_per_level=codes_per_level, normalize=normalize)
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
