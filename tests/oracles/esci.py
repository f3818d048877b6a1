"""The paper's rules for ESCI, one product and one judgement at a time, over plain rows."""

import hashlib
import html
import json
import re

LABELS = "ESCI"


def paths_of(lines: list[dict], locale: str) -> dict[str, list[str]]:
    """The one path of each product: a line that names the locale first, then the deepest, then the first by its names."""
    candidates: dict[str, list] = {}
    for line in lines:
        if (line.get("locale") or locale) != locale:
            continue
        path = line.get("category") or []
        key = (line.get("locale") is None, -len(path), path)
        candidates.setdefault(line.get("asin") or line["product_id"], []).append((key, path))
    return {product: min(found)[1] for product, found in candidates.items()}


def text_of(value: str | None) -> str | None:
    value = re.sub(r"(?i)</?[a-z][^<>]*>", " ", value or "")
    return re.sub(r"\s+", " ", html.unescape(value)).strip() or None


def prepare(products, examples, lines, *, locale, version, corpus="judged", validation=0.0, seed=0, keep_unseen=False):
    """({product_id: (title, path)}, {(query_id, product_id, split): label}); rows as lists of dicts."""
    judged = [e for e in examples if e["product_locale"] == locale and e[f"{version}_version"] == 1]
    pool = {e["product_id"] for e in judged}
    paths, kept = paths_of(lines, locale), {}
    for product in products:
        name, title = product["product_id"], text_of(product["product_title"])
        path = paths.get(name, [])
        if product["product_locale"] != locale or (corpus == "judged" and name not in pool):
            continue
        if title and len(path) >= 3 and (name not in kept or title < kept[name][0]):
            kept[name] = (title, path[:3])
    pairs = {}
    for e in judged:
        if e["product_id"] not in kept:
            continue
        split, query = e["split"], str(e["query_id"])
        hashed = int.from_bytes(hashlib.sha256(f"{seed}:{query}".encode()).digest()[:8], "big") / 2**64
        if split == "train" and hashed < validation:
            split = "validation"
        key = (query, e["product_id"], split)
        pairs[key] = min(e["esci_label"], pairs.get(key, "I"), key=LABELS.index)
    taught = {product for (_, product, split), label in pairs.items() if split == "train" and label in "ES"}
    if not keep_unseen:
        pairs = {key: label for key, label in pairs.items() if key[2] == "train" or key[1] in taught}
    return kept, pairs


def category_lines(block: bytes) -> list[tuple]:
    """(product_id, locale, path) of every line that says them in the right types."""
    rows = []
    for line in block.split(b"\n"):
        try:
            value = json.loads(line)
            name = value.get("asin") if value.get("asin") is not None else value.get("product_id")
            path, locale = value.get("category"), value.get("locale")
            texts = [n for n in (value.get("asin"), value.get("product_id"), locale) if n is not None]
            texts += [n for n in path or [] if n is not None]
            assert isinstance(path, (list, type(None))) and all(isinstance(n, str) for n in texts) and name
            for text in texts:
                text.encode()
        except (ValueError, AttributeError, AssertionError):
            continue
        rows.append((name, locale and locale.lower(), path))
    return rows
