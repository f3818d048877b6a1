"""Slow, obvious EG-GRPO: one group, one member, one level and one code at a time, in Python floats."""

import itertools
import math


def members(rollouts, experts, *, group, injected, form):
    """[(ID, is expert)] of one group: what stays of the rollouts, up to `injected` experts not among them, and, in fixed form,
    more rollouts until the group is full."""
    rollouts, experts = [tuple(r) for r in rollouts], [tuple(e) for e in experts]
    first = rollouts if form == "widened" else rollouts[: group - injected]
    found = [(docid, False) for docid in first]
    entered = 0
    for docid in experts:
        if entered < injected and docid not in [other for other, _ in found]:
            found.append((docid, True))
            entered += 1
    if form == "fixed":
        for docid in rollouts[group - injected :]:
            if len(found) < group and docid not in [other for other, _ in found]:
                found.append((docid, False))
    return found


def advantages(rewards, eps):
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if all(abs(reward - mean) < 1e-6 for reward in rewards):
        return [0.0] * len(rewards)
    return [(reward - mean) / (deviation + eps) for reward in rewards]


def gained(member) -> float:
    """log π / π_ref of the member's ID."""
    steps = zip(member["new"], member["reference"], member["codes"])
    return sum(new[code] - reference[code] for new, reference, code in steps)


def loss(groups, objective) -> tuple[float, float, float]:
    """(loss, kl, entropy). `groups`: per query a list of members, each a dict of codes, expert, advantage, and per level the
    log-probabilities over all codes: now (`new`), at the rollout (`old`), of the reference (`reference`)."""
    total = kl_total = entropy_total = 0.0
    for group in groups:
        terms, kls, entropies = [], [], []
        pairs = [
            math.log1p(math.exp(-objective.beta * (gained(one) - gained(other))))
            for one, other in itertools.permutations(group, 2)
            if one["advantage"] > other["advantage"] + 1e-6
        ]
        for member in group:
            steps = list(zip(member["new"], member["old"], member["reference"], member["codes"]))
            changes = [new[code] - old[code] for new, old, _, code in steps]
            ratios = [math.exp(c) for c in changes] if objective.ratio == "token" else [math.exp(sum(changes))]
            a, low, high = member["advantage"], 1 - objective.clip, 1 + objective.clip
            term = -sum(min(ratio * a, min(max(ratio, low), high) * a) for ratio in ratios)
            if member["expert"] and objective.expert_term == "sft":
                term = -objective.expert_weight * sum(new[code] for new, _, _, code in steps)
            if objective.term == "pairs":
                term = sum(pairs) / max(1, len(pairs))
            kl = entropy = 0.0
            for new, _, reference, code in steps:
                if objective.kl == "exact":
                    kl += sum(math.exp(p) * (p - q) for p, q in zip(new, reference))
                else:
                    kl += math.exp(reference[code] - new[code]) - (reference[code] - new[code]) - 1
                entropy -= sum(math.exp(p) * p for p in new)
            terms.append(term + objective.kl_weight * kl)
            kls.append(kl)
            entropies.append(entropy)
        total += sum(terms) / len(terms) / len(groups)
        kl_total += sum(kls) / len(kls) / len(groups)
        entropy_total += sum(entropies) / len(entropies) / len(groups)
    return total, kl_total, entropy_total


def inclusion(leaf_probability: dict, size: int) -> dict:
    """P(an ID is among `size` drawn one after the other without replacement), by every ordered draw."""
    found = dict.fromkeys(leaf_probability, 0.0)
    for draw in itertools.permutations(leaf_probability, size):
        chance, left = 1.0, 1.0
        for docid in draw:
            chance *= leaf_probability[docid] / left
            left -= leaf_probability[docid]
        for docid in draw:
            found[docid] += chance
    return found
