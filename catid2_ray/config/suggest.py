"""The recipe that fits a catalogue: every number that follows from its size or its pairs, each with the reason beside it.

The arithmetic is the table of small functions below, made to meet two recipes that were tuned by hand: the quickstart (6,000
products, 13,032 training pairs) and Home Depot (54,667 and 34,781). Between and beyond them it is a beginning, not a result.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

_WIDTH = 110  # columns of a comment
_SMALL = 20_000  # products below which a smaller network learns as well, several times as fast
_LEAST_STEPS = 740  # of the generator, as in the quickstart: with half of them it is well under BM25


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a look at a catalogue found. `products` may be an estimate. `separator`: of category paths that are one text;
    `depth`: names of the deepest path (0 = no categories). `texts`: columns to embed; `given`: width of the column embedding.
    `filters`: column → type; `html`: column → share of its texts with HTML. `grades`: relevance → pairs; `splits`: split → pairs;
    `teaching`: relevance → pairs of the train split."""

    name: str
    root: str
    products: int
    exact: bool = True
    separator: str | None = None
    depth: int = 0
    texts: tuple[str, ...] = ("title",)
    given: int | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    has_value: bool = False
    html: Mapping[str, float] = field(default_factory=dict)
    language: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    grades: Mapping[float, int] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)
    teaching: Mapping[float, int] = field(default_factory=dict)
    queries: int = 0
    leaked: int = 0
    cores: int = 1


def codes_per_level(products: int) -> int:
    """The power of two that leaves 64 to 128 products per first code, from 8 to 256."""
    fits = max(1, products // 64)
    return min(256, max(8, 1 << (fits.bit_length() - 1)), max(2, products))


def rows_per_part(products: int) -> int:
    """Four parts, so that several workers have something to do; at most 4,096 rows, of millions 16,384."""
    return 16_384 if products > 1_000_000 else min(4_096, max(16, products // 4))


def quantizer_batch(products: int) -> int:
    """Twelve steps an epoch while the catalogue is small. Even, for two workers."""
    return min(1_024, max(32, products // 12 // 2 * 2), max(2, products // 2 * 2))


def generator_batch(examples: int) -> int:
    """256; of few examples smaller, so that an epoch is more than a few steps."""
    return 256 if examples >= 10_000 else 128 if examples >= 5_000 else 64


def generator_epochs(examples: int) -> int:
    """At least 10, and enough for the least number of steps."""
    return max(10, -(-_LEAST_STEPS // max(1, examples // generator_batch(examples))))


def vocabulary(products: int) -> int:
    """Subwords: a third of the titles' number, from 500 to 8,000."""
    return min(8_000, max(500, products // 3 // 500 * 500))


def relevant_from(grades: Mapping[float, int]) -> float:
    """The lowest grade in the upper half of the scale; of more than 20 grades (clicks, say) the lowest above 0."""
    if len(grades) > 20:
        return min((grade for grade in grades if grade > 0), default=max(grades))
    middle = (min(grades) + max(grades)) / 2
    return min(grade for grade in grades if grade >= middle)


class Line(NamedTuple):
    """A setting of a section ("" = the recipe itself) and the reason for it, which may be empty."""

    section: str
    key: str
    value: object
    reason: str = ""


def store_of(name: str) -> str:
    """The folder of a catalogue's store: no other catalogue's, for a job builds on the release that it finds in its store."""
    return re.sub(r"[^\w.-]+", "_", name) + "_store"


def suggest(facts: Facts) -> list[Line]:
    """The lines of a recipe that fits, section after section."""
    lines = [
        Line("", "name", facts.name),
        Line(
            "",
            "store",
            store_of(facts.name),
            "A folder or s3:// prefix of this catalogue alone; all that is made lies there.",
        ),
    ]
    return [
        *lines,
        *_catalog(facts),
        *_embedding(facts),
        *_quantizer(facts),
        *_generator(facts),
        *_serving(facts),
        *_evaluation(facts),
    ]


def _catalog(facts: Facts) -> list[Line]:
    count = f"{'' if facts.exact else 'about '}{facts.products:,}"
    lines = [
        Line("catalog", "root", facts.root),
        Line(
            "catalog", "rows_per_part", rows_per_part(facts.products), f"{count} products in parts that workers share."
        ),
    ]
    if facts.separator:
        lines.append(
            Line("catalog", "category_separator", facts.separator, "category_path is one text, cut here into names.")
        )
    if facts.depth:
        cut = f"; the deepest has {facts.depth}, the rest is cut" if facts.depth > 3 else ""
        lines.append(
            Line("catalog", "max_category_depth", min(3, facts.depth), f"Category paths count to this depth, below the four levels "
                 f"of an ID{cut}.")
        )  # fmt: skip
    if facts.filters:
        left = "; ".join(f"{name}: {why}" for name, why in facts.left_out.items())
        reason = f"Numbers, and columns of few different values.{f' Left out: {left}.' if left else ''}"
        lines.append(Line("catalog", "filter_columns", dict(facts.filters), reason))
    if facts.leaked:
        lines.append(
            Line("catalog", "allow_leak", False, f"{facts.leaked:,} queries are in train and in test, so that what is measured was "
                 "learned. `reindex` refuses that: split by query, or set true where it is meant so.")
        )  # fmt: skip
    return lines


def _embedding(facts: Facts) -> list[Line]:
    if facts.given:
        reason = f"The table's column embedding has {facts.given} numbers a product; encoder would compute others."
        return [Line("embedding", "source", "given", reason)]
    lines = [
        Line("embedding", "encoder", "lsa", "Built in, no download. A sentence encoder, by its Hugging Face id or folder, finds "
             f"more; it must know the language. {facts.language}".strip())
    ]  # fmt: skip
    if facts.products < _SMALL:
        width = min(96, max(2, facts.products // 3))
        lines.append(Line("embedding", "width", width, "So few texts do not fill more dimensions."))
    html = ", ".join(f"{share:.0%} of {column}" for column, share in facts.html.items())
    reason = f"HTML stands in {html}, and would be taken for words: strip it, then add the column here." if html else ""
    return [*lines, Line("embedding", "text", list(facts.texts), reason)]


def _quantizer(facts: Facts) -> list[Line]:
    products, codes, batch = facts.products, codes_per_level(facts.products), quantizer_batch(facts.products)
    lines = [
        Line(
            "quantizer",
            "codes_per_level",
            [codes] * 4,
            f"{codes} leave {products / codes:.0f} products per first code.",
        ),
        Line("quantizer", "batch", batch, f"{-(-products // batch):,} steps an epoch."),
    ]
    return lines + _workers("quantizer", facts)


def _workers(section: str, facts: Facts) -> list[Line]:
    return [Line(section, "workers", 2, f"This machine has {facts.cores} cores.")] if facts.cores > 1 else []


def _generator(facts: Facts) -> list[Line]:
    products, lines, pairs = facts.products, [], 0
    if facts.grades:
        least = relevant_from(facts.grades)
        pairs = sum(count for grade, count in facts.teaching.items() if grade >= least)
        lines.append(Line("generator", "min_relevance", least, _grades(facts)))
    small = products < _SMALL
    if small:
        lines += [
            Line(
                "generator",
                "vocabulary",
                vocabulary(products),
                "Subwords of the tokenizer that is trained on these texts.",
            ),
            Line("generator", "width", 128, "A small network: it learns as well from so few products, and faster."),
            Line("generator", "feed_forward", 384),
        ]
    lines += [Line("generator", "dropout", 0), Line("generator", "word_keep", 0.4)]
    titles = products / pairs if pairs else 1.0
    if pairs:
        reason = f"{pairs:,} training pairs reach min_relevance, and every one of {products:,} titles is seen about once an epoch."
        lines.append(Line("generator", "mix", {"query": 1, "title": float(f"{titles:.2g}")}, reason))
    examples = round((pairs or products) * (1 + titles if pairs else 1))
    batch, epochs = generator_batch(examples), generator_epochs(examples)
    steps = max(1, examples // batch)
    lines += [
        Line("generator", "learning_rate", 0.002 if small else 0.0015),
        Line("generator", "epochs", epochs, f"{steps:,} steps an epoch, {steps * epochs:,} in all."),
        Line("generator", "batch", batch),
    ]
    return lines + _workers("generator", facts)


def _grades(facts: Facts) -> str:
    if len(facts.grades) > 20:
        most = f"Relevance has {len(facts.grades)} values up to {max(facts.grades):g}"
        return f"{most}: every pair above 0 counts. Raise it if some of them are chance."
    said = ", ".join(f"{grade:g}: {count:,}" for grade, count in sorted(facts.grades.items()))
    return f"Pairs by relevance: {said}. From the middle of the scale on a product is an answer; raise it if that is too low."


def _serving(facts: Facts) -> list[Line]:
    columns = [*facts.filters, *(["category_path"] if facts.depth else []), *(["value"] if facts.has_value else [])]
    return [Line("serving", "filters", columns, "What requests may filter by.")] if columns else []


def _evaluation(facts: Facts) -> list[Line]:
    if not facts.grades:
        return [
            Line("evaluation", "methods", [], "There is no table of pairs: nothing can be measured, and no gate holds.")
        ]
    lines = [Line("evaluation", "min_relevance", relevant_from(facts.grades), "As for the training.")]
    split = next((name for name in ("test", "validation", "train") if facts.splits.get(name)), "test")
    counts = ", ".join(
        f"{name} {facts.splits[name]:,}" for name in ("train", "validation", "test") if facts.splits.get(name)
    )
    reason = f"Pairs by split: {counts}."
    if split == "train":
        reason += " What is measured was learned: keep some queries back as split test."
    return [*lines, Line("evaluation", "split", split, reason)]


def as_yaml(lines: list[Line], title: str) -> str:
    """A commented recipe. `title`: what stands above it."""
    text, section = _comment(title, 0), ""
    for line in lines:
        if line.section != section:
            section = line.section
            text += f"{section}:\n"
        indent = 2 if section else 0
        text += _comment(line.reason, indent) if line.reason else ""
        text += f"{' ' * indent}{line.key}: {_value(line.value)}\n"
    return text


def _value(value) -> str:
    """In one line of YAML; whole numbers without a point."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False).strip()[
        1:-1
    ]


def _comment(text: str, indent: int) -> str:
    before = " " * indent + "# "
    return textwrap.fill(text, _WIDTH, initial_indent=before, subsequent_indent=before, break_long_words=False) + "\n"
