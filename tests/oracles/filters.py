"""A filter expression asked of every product in turn, as the expression reads."""

from datetime import date
from decimal import Decimal


def allowed_rows(expression, rows):
    """One bool per product; `rows` are dicts, with None where a value is missing."""
    return [_allows(expression, row) for row in rows]


def _allows(node, row):
    if "all" in node:
        return all([_allows(part, row) for part in node["all"]])
    if "any" in node:
        return any([_allows(part, row) for part in node["any"]])
    if "not" in node:
        return not _allows(node["not"], row)
    if "products" in node:
        return row["product_id"] in node["products"]
    value = row[node["column"]]
    if value is None:
        return False
    if "in" in node:
        return value in node["in"]
    if "is" in node:
        return value is node["is"]
    if "under" in node:
        return value[: len(node["under"])] == node["under"]
    if "has" in node:
        return any(name in node["has"] for name in value)
    low, high = (value if node.get(end) is None else _as(value, node[end]) for end in ("from", "to"))
    return low <= value <= high


def _as(value, bound):
    """A bound of JSON in the type of a column's values."""
    if isinstance(value, date):
        return date.fromisoformat(bound)
    return Decimal(repr(bound)) if isinstance(value, Decimal) else bound


def allowed_between(allowed, start, end):
    return sum(allowed[start:end])
