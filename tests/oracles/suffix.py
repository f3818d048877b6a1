"""Ordinal suffixes the slow way: a dictionary of groups, one sorted list each, digits by division."""

import math


def ordinal_suffix(prefixes, product_ids, priorities=None, base=None):
    """({product_id: list of tokens}, codes per level)."""
    groups = {}
    for row, product_id in enumerate(product_ids):
        priority = 0.0 if priorities is None else float(priorities[row])
        place = (1, 0.0) if math.isnan(priority) else (0, -priority)
        groups.setdefault(int(prefixes[row]), []).append((place, product_id))
    ordinals = {}
    for group in groups.values():
        for ordinal, (_, product_id) in enumerate(sorted(group)):
            ordinals[product_id] = ordinal
    largest = max(ordinals.values(), default=0) + 1
    if base is None:
        return {product_id: [ordinal] for product_id, ordinal in ordinals.items()}, [largest]
    width = 1
    while base**width < largest:
        width += 1
    tokens = {}
    for product_id, ordinal in ordinals.items():
        digits = []
        for _ in range(width):
            ordinal, digit = divmod(ordinal, base)
            digits.insert(0, digit)
        tokens[product_id] = digits
    return tokens, [base] * width
