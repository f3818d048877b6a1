"""Renaming by trying every permutation, and churn by looking products up one at a time."""

from itertools import permutations


def worth(old, new, rename):
    """(products in agreement, codes that keep their number) under one renaming of one level."""
    return sum(rename[b] == a for a, b in zip(old, new, strict=True)), sum(
        code == name for code, name in enumerate(rename)
    )


def best_worth(old, new, codes):
    return max(worth(old, new, rename) for rename in permutations(range(codes)))


def changed(old, new):
    """[common products whose first m tokens are not the same, m = 1 … L], L of any row."""
    levels = len(next(iter([*old.values(), *new.values()]), ()))
    return [sum(old[p][:m] != new[p][:m] for p in old if p in new) for m in range(1, levels + 1)]


def arrived(old, new):
    """{product_id of the new release: it did not have that ID before}."""
    return {p: p not in old or old[p] != new[p] for p in new}


def churn(old, new):
    """`old`, `new`: {product_id: tuple of codes}. The same keys as the fast one."""
    common = sorted(set(old) & set(new))
    levels = len(next(iter([*old.values(), *new.values()]), ()))
    names_before, names_now = {}, {}
    for names, release in ((names_before, old), (names_now, new)):
        for product_id, docid in release.items():
            names.setdefault(docid, set()).add(product_id)
    reused = sum(1 for docid, ids in names_before.items() if names_now.get(docid, set()) - ids)
    return {
        "common": len(common),
        "new": len(set(new) - set(old)),
        "retired": len(set(old) - set(new)),
        "prefix_churn": [
            sum(old[p][:m] != new[p][:m] for p in common) / len(common) if common else 0.0 for m in range(1, levels + 1)
        ],
        "addresses": len(names_before),
        "addresses_reused": reused,
        "address_reuse": reused / len(names_before) if names_before else 0.0,
    }
