"""Slow, obvious scores of any kind of generator: one query, one prefix, one uncached forward pass at a time."""

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
