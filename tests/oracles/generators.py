"""Slow, obvious scores of any kind of generator: one query, one prefix, one uncached forward pass at a time."""

import math

import torch


def next_logits(model, query_T, prefix, *, space) -> torch.Tensor:
    """float64 K: the logits of the next code after `prefix`, of a T5-like model with a plain head."""
    first = len(model.lm_head.weight) - sum(space.codes_per_level)
    offsets = [first + sum(space.codes_per_level[:level]) for level in range(space.levels)]
    ids_1T = torch.as_tensor([[int(token) for token in query_T]])
    ones_1T = torch.ones_like(ids_1T)
    with torch.no_grad():
        memory_1TD = model.encoder(input_ids=ids_1T, attention_mask=ones_1T).last_hidden_state
        tokens = torch.tensor([[0, *(offset + int(code) for offset, code in zip(offsets, prefix))]])
        hidden_D = model.decoder(
            input_ids=tokens, encoder_hidden_states=memory_1TD, encoder_attention_mask=ones_1T, use_cache=False
        ).last_hidden_state[0, -1]
    if model.config.scale_decoder_outputs:
        hidden_D = hidden_D * model.config.d_model**-0.5
    level = len(prefix)
    return (model.lm_head.weight[offsets[level] :][: space.codes_per_level[level]] @ hidden_D).detach().double()


def brute_force(model, docids, query_T, *, space, logits=next_logits) -> list[tuple[float, tuple[int, ...]]]:
    """(logp, ID) of every ID, best first, equal scores by ID; `logits(model, query_T, prefix, space=…)` of a next code."""
    docids = sorted({tuple(map(int, docid)) for docid in docids})
    prefixes = {docid[:level] for docid in docids for level in range(space.levels)}
    steps = {prefix: logits(model, query_T, prefix, space=space).log_softmax(0) for prefix in prefixes}
    scored = [(float(sum(steps[docid[:i]][code] for i, code in enumerate(docid))), docid) for docid in docids]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def causal_next_logits(model, query_T, prefix, *, space) -> torch.Tensor:
    """float64 K: the same of a CausalGenerator, from transformers' own forward pass over prompt and prefix."""
    first = len(model.lm_head.weight) - sum(space.codes_per_level)
    offsets = [first + sum(space.codes_per_level[:level]) for level in range(space.levels)]
    ids = [int(token) for token in query_T] + [offset + int(code) for offset, code in zip(offsets, prefix)]
    with torch.no_grad():
        logits_V = model.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    level = len(prefix)
    return logits_V[offsets[level] :][: space.codes_per_level[level]]


def generate_causal(model, docids, query_T, *, space, beams: int) -> list[tuple[float, tuple[int, ...]]]:
    """transformers' `generate` under a dictionary trie, one query: (score over the whole vocabulary, ID), best first."""
    first = len(model.lm_head.weight) - sum(space.codes_per_level)
    offsets = [first + sum(space.codes_per_level[:level]) for level in range(space.levels)]
    children = {}
    for docid in docids:
        tokens = [offset + int(code) for offset, code in zip(offsets, docid)]
        for level, token in enumerate(tokens):
            children.setdefault(tuple(tokens[:level]), set()).add(token)
    length = len(query_T)
    answer = model.model.generate(
        input_ids=torch.as_tensor([[int(token) for token in query_T]]), attention_mask=torch.ones(1, length).long(),
        num_beams=beams, num_return_sequences=beams, max_new_tokens=space.levels, length_penalty=0.0, do_sample=False,
        eos_token_id=None, prefix_allowed_tokens_fn=lambda _, ids: sorted(children[tuple(ids.tolist()[length:])]),
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    codes = answer.sequences[:, length:] - torch.tensor(offsets)
    return [(float(score), tuple(docid)) for score, docid in zip(answer.sequences_scores, codes.tolist())]


def near_codes(codebook_KZ, temperature: float) -> list[list[float]]:
    """K lists of K: exp(−‖e_c − e_c*‖ / t), made to sum to 1, pair by pair; t is `temperature` mean distances."""
    words = [[float(x) for x in word] for word in codebook_KZ]
    distance = [[math.dist(a, b) for b in words] for a in words]
    pairs = [distance[i][j] for i in range(len(words)) for j in range(len(words)) if i != j]
    t = temperature * sum(pairs) / len(pairs)
    weights = [[math.exp(-d / t) for d in row] for row in distance]
    return [[w / sum(row) for w in row] for row in weights]
