"""Slow, obvious exact scores: every prefix that an ID has, one step at a time from its beginning."""


def prefix_scores(step_logp, ids) -> list[list[float]]:
    """Per depth 1 … L log P of every prefix of an ID, prefixes in order. `step_logp(prefix)`: log p of every next code."""
    ids = sorted({tuple(map(int, docid)) for docid in ids})
    scores = []
    for depth in range(1, len(ids[0]) + 1):
        prefixes = sorted({docid[:depth] for docid in ids})
        scores.append([sum(step_logp(prefix[:at])[prefix[at]] for at in range(depth)) for prefix in prefixes])
    return scores
