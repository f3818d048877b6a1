"""A generated shop for people without data: hardware, kitchen, bath, garden and storage, with judged queries.

Relevance follows from a latent intent, a use (and often a kind of thing) with preferences for material, style, colour,
size or pack, never from the category. Queries word the intent with synonyms that titles share only in part, so a
lexical retriever is decent and not perfect, and one intent's wordings fall into different splits. A fifth of the
product lines and some single variants are "new": no training pair names them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.catalog.shop_words import (
    BRANDS,
    CLOSING_WORDS,
    COLOUR_NAMES,
    COLOUR_WORDS,
    MATERIAL_NAMES,
    MATERIAL_WORDS,
    PACK_WORDS,
    PACKS,
    SERIES,
    SIZE_WORDS,
    SIZES,
    STYLE_NAMES,
    STYLE_WORDS,
    USE_NAMES,
    USE_TEXTS,
    USE_TITLES,
    USE_WORDS,
    Kind,
    read_kinds,
)
from catid2_ray.errors import InputError
from catid2_ray.tables import CATEGORY_PATH, PAIRS

_DEEPEST_MATCH = 15  # an intent is narrowed until it fits this many products: more could not all be judged
_COLUMNS = ("material", "style", "colour", "bucket", "pack", "brand")  # what a preference can be about
_COLUMN_ODDS = (0.35, 0.2, 0.2, 0.12, 0.05, 0.08)


class Synthetic(NamedTuple):
    """Two tables in the house schema: products (without embedding), and pairs."""

    products: pa.Table
    pairs: pa.Table


def generate(*, products: int, queries: int, seed: int) -> Synthetic:
    """A shop of `products` products and `queries` judged queries, the same bytes for the same three numbers.

    Relevance 3: everything the intent asks for; 2: the same article in another size, colour or pack; 1: the same kind
    and use without the preference. At most 15 products have grade 3 for a query. Splits are by query, about 80 % train,
    8 % validation, 12 % test. From grade 2 on a product counts as relevant (recommended for training and evaluation).
    Raises InputError below 1 product or 1 query, or when the shop is too small for so many different queries.
    """
    if products < 1 or queries < 1:
        raise InputError(f"a generated shop needs at least one product and one query, found {products} and {queries}")
    rng = np.random.default_rng(seed)
    kinds = read_kinds()
    latent = _latents(rng, kinds, products)
    product_ids = np.array([f"p{number:07d}" for number in range(products)])
    table = _product_table(rng, kinds, latent, product_ids)
    return Synthetic(table, _pair_table(rng, kinds, latent, product_ids, queries))


def _latents(rng: np.random.Generator, kinds: list[Kind], products: int) -> dict[str, np.ndarray]:
    """int arrays N: what each product is. Lines of 1 to 6 variants, in shuffled order."""
    variants = rng.choice((1, 1, 2, 3, 4, 6), products)
    line_N = np.repeat(np.arange(products), variants)[:products]
    step_N = np.arange(products) - np.searchsorted(line_N, line_N)
    lines = int(line_N[-1]) + 1
    kind = rng.integers(len(kinds), size=lines)
    draw = rng.random((lines, 3))
    use = np.array([kinds[k].uses[int(x * len(kinds[k].uses))] for k, x in zip(kind, draw[:, 0])])
    material = np.array([kinds[k].materials[int(x * len(kinds[k].materials))] for k, x in zip(kind, draw[:, 1])])
    sizes_N = np.array([len(kinds[k].sizes) for k in kind])[line_N]
    bulky = np.array([kinds[k].sizes in (SIZES["general"], SIZES["feet"], SIZES["quart"]) for k in kind])
    by_size_N = (draw[:, 2] < 0.5)[line_N]
    first_N, tint_N = rng.integers(60, size=lines)[line_N], rng.integers(len(COLOUR_NAMES), size=lines)[line_N]
    size_N = (first_N + by_size_N * step_N) % sizes_N
    tint_N = (tint_N + np.where(by_size_N, step_N // sizes_N, step_N)) % len(COLOUR_NAMES)
    new_N = (rng.random(lines) < 0.2)[line_N] | (rng.random(products) < 0.12)
    latent = {
        "line": line_N,
        "kind": kind[line_N],
        "use": use[line_N],
        "material": material[line_N],
        "style": rng.integers(len(STYLE_NAMES), size=lines)[line_N],
        "colour": tint_N,
        "size": size_N,
        "bucket": np.where(size_N == 0, 0, np.where(size_N == sizes_N - 1, 2, 1)),
        "pack": np.minimum(rng.choice(PACKS, lines), np.where(bulky, 2, 10))[line_N],
        "brand": rng.integers(len(BRANDS), size=lines)[line_N],
        "noun": rng.integers(2, size=lines)[line_N],
        "series": rng.integers(len(SERIES), size=lines)[line_N],
        "new": new_N.astype(np.int64),
        **{name: (rng.random(lines) < odds)[line_N].astype(np.int64) for name, odds in _SAID_ODDS.items()},
        "filed": rng.choice((0, 1, 9), lines, p=(0.9, 0.08, 0.02))[line_N],
        "closing": rng.integers(len(CLOSING_WORDS), size=lines)[line_N],
    }
    order = rng.permutation(products)
    return {name: values[order] for name, values in latent.items()}


# How often a line's titles say its style, material and use, and how often it has a description.
_SAID_ODDS = {"says_style": 0.45, "says_material": 0.8, "says_use": 0.65, "described": 0.65}


def _product_table(rng, kinds: list[Kind], latent: dict[str, np.ndarray], product_ids: np.ndarray) -> pa.Table:
    titles, descriptions, paths = [], [], []
    for row in zip(*(values.tolist() for values in latent.values())):
        at = dict(zip(latent, row))
        kind = kinds[at["kind"]]
        noun = kind.nouns[at["noun"] % len(kind.nouns)]
        material, style = MATERIAL_NAMES[at["material"]], STYLE_NAMES[at["style"]]
        words = [BRANDS[at["brand"]], SERIES[at["series"]], kind.sizes[at["size"]]]
        words += [style.title()] * at["says_style"] + [material.title()] * at["says_material"]
        use = at["use"]
        # "Towel Ring" already says what it is for.
        says_use = at["says_use"] and USE_TITLES[use].split()[-1] not in noun.split()
        words += [USE_TITLES[use]] * says_use + [noun, "in"]
        words += [COLOUR_NAMES[at["colour"]].title()]
        words += [f"({at['pack']}-Pack)"] * (at["pack"] > 1)
        titles.append(" ".join(words))
        descriptions.append(
            f"{noun} for {USE_TEXTS[use]}. {style.title()} look, made of {material}. {CLOSING_WORDS[at['closing']]}"
            if at["described"]
            else None
        )
        # Some lines are filed one level too high or not at all, as in any shop.
        paths.append([] if at["filed"] == 9 else kind.path[: len(kind.path) - at["filed"]] or kind.path)
    columns = [product_ids, titles, pa.array(descriptions, pa.string()), pa.array(paths, CATEGORY_PATH)]
    return pa.table(columns, names=["product_id", "title", "description", "category_path"])


@dataclass(frozen=True)
class _Intent:
    """`rows`: the products that fit. `parts`: for each thing asked for, the wordings, the shop's own one first."""

    rows: np.ndarray
    kind: int | None
    use: int | None
    noun_words: tuple[str, ...]
    use_words: tuple[str, ...]
    preference_words: tuple[tuple[str, ...], ...]


def _preference(rng, latent, anchor: int, column: str) -> tuple[set[int], tuple[str, ...]] | None:
    """The values of `column` that a wish like the anchor product's accepts, and how it may be worded."""
    value = int(latent[column][anchor])
    if column == "material":
        shared = [w for w in MATERIAL_WORDS[value] if sum(w in words for words in MATERIAL_WORDS) > 1]
        if shared and rng.random() < 0.35:
            return {i for i, words in enumerate(MATERIAL_WORDS) if shared[0] in words}, (shared[0],)
        own = [word for word in MATERIAL_WORDS[value] if word not in shared]
        return {value}, (MATERIAL_NAMES[value], *own)
    if column == "style":
        return {value}, (STYLE_NAMES[value], *STYLE_WORDS[value])
    if column == "colour":
        return {value}, (COLOUR_NAMES[value], *COLOUR_WORDS[value])
    if column == "brand":
        return {value}, (BRANDS[value].lower(),)
    words = SIZE_WORDS[value] if column == "bucket" else PACK_WORDS.get(value, ())
    return ({value}, words) if words else None


def _intent(rng, kinds, latent, by_kind, by_use) -> _Intent | None:
    """Start from a random product and narrow the wish until at most 15 products fit, at least 3 where possible."""
    anchor = int(rng.integers(len(latent["kind"])))
    kind, use = int(latent["kind"][anchor]), int(latent["use"][anchor])
    asks_kind, asks_use = ((True, True), (False, True), (True, False))[rng.choice(3, p=(0.55, 0.2, 0.25))]
    rows = by_kind[kind] if asks_kind else by_use[use]
    if asks_kind and asks_use:
        rows = rows[latent["use"][rows] == use]
    wishes = []
    for column in rng.choice(len(_COLUMNS), len(_COLUMNS), replace=False, p=_COLUMN_ODDS):
        if wishes and len(rows) <= _DEEPEST_MATCH:
            break
        wish = _preference(rng, latent, anchor, _COLUMNS[column])
        if wish is None:
            continue
        fewer = rows[np.isin(latent[_COLUMNS[column]][rows], list(wish[0]))]
        if len(fewer) >= min(3, len(rows)):
            rows = fewer
            wishes.append(wish[1])
    if not wishes:
        return None
    if len(rows) > _DEEPEST_MATCH:
        rows = np.sort(rng.choice(rows, _DEEPEST_MATCH, replace=False))
    nouns = (*(noun.lower() for noun in kinds[kind].nouns), *kinds[kind].query_nouns) if asks_kind else ()
    uses = (USE_TITLES[use].lower(), *USE_WORDS[use]) if asks_use else ()
    return _Intent(rows, kind if asks_kind else None, use if asks_use else None, nouns, uses, tuple(wishes))


def _wording(rng, intent: _Intent) -> str:
    """One way to type the intent: half of the words are the shop's own, the others paraphrases."""

    def pick(words: tuple[str, ...], own: int) -> str:
        return words[rng.integers(own)] if rng.random() < 0.5 else words[rng.integers(len(words))]

    wish = " ".join(pick(words, 1) for words in intent.preference_words)
    noun = pick(intent.noun_words, 2) if intent.noun_words else ""
    if not intent.use_words:
        return f"{wish} {noun}" if rng.random() < 0.7 else f"{noun} {wish}"
    use = pick(intent.use_words, 1)
    forms = (f"{wish} {noun or 'something'} for {use}", f"{use} {noun} {wish}", f"{wish} {use} {noun}")
    words = forms[rng.integers(3)].split()
    return " ".join(word for word, before in zip(words, ["", *words]) if word != before)


def _judge(rng, latent, intent: _Intent, by_kind, by_use) -> tuple[np.ndarray, np.ndarray]:
    """Rows and grades 3, 2, 1. Judgements are incomplete: at most 3 other variants and 4 other lines are looked at."""
    nearby = by_use[intent.use] if intent.kind is None else by_kind[intent.kind]
    if intent.kind is not None and intent.use is not None:
        nearby = nearby[latent["use"][nearby] == intent.use]
    nearby = nearby[~np.isin(nearby, intent.rows)]
    same_line = np.isin(latent["line"][nearby], latent["line"][intent.rows])
    second, third = rng.permutation(nearby[same_line])[:3], rng.permutation(nearby[~same_line])[:4]
    grades = np.repeat((3.0, 2.0, 1.0), (len(intent.rows), len(second), len(third)))
    return np.concatenate((intent.rows, second, third)), grades


def _pair_table(rng, kinds, latent, product_ids: np.ndarray, queries: int) -> pa.Table:
    by_kind = [np.flatnonzero(latent["kind"] == kind) for kind in range(len(kinds))]
    by_use = [np.flatnonzero(latent["use"] == use) for use in range(len(USE_NAMES))]
    seen_texts: set[str] = set()
    texts, splits, rows, grades = [], [], [], []
    for _ in range(10 * queries):
        if len(texts) >= queries:
            break
        intent = _intent(rng, kinds, latent, by_kind, by_use)
        if intent is None:
            continue
        judged, grade = _judge(rng, latent, intent, by_kind, by_use)
        for _ in range(int(rng.integers(1, 5))):
            text = _wording(rng, intent)
            split = ("train", "validation", "test")[rng.choice(3, p=(0.8, 0.08, 0.12))]
            kept = (latent["new"][judged] == 0) | (split != "train")
            if text not in seen_texts and kept.any() and len(texts) < queries:
                seen_texts.add(text)
                texts.append(text)
                splits.append(split)
                rows.append(judged[kept])
                grades.append(grade[kept])
    if len(texts) < queries:
        raise InputError(
            f"{len(product_ids)} products give only {len(texts)} different queries; ask for fewer than {queries}"
        )
    query = np.repeat(np.arange(queries), [len(r) for r in rows])
    columns = [
        np.array([f"q{number:06d}" for number in range(queries)])[query],
        np.array(texts, dtype=object)[query],
        product_ids[np.concatenate(rows)],
        np.concatenate(grades),
        np.array(splits, dtype=object)[query],
    ]
    return pa.table([pa.array(column) for column in columns], schema=PAIRS)
