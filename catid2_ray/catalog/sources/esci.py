"""The Shopping Queries (ESCI) dataset as Amazon publishes it: its columns in, the house's product texts and judgements out.

github.com/amazon-science/esci-data: 1.8 M products and 2.6 M judgements in three locales (arXiv 2206.06588). It has no
categories. Everything works on one record batch at a time.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.columns import require_columns, string_column
from catid2_ray.catalog.products import joined, or_null
from catid2_ray.errors import InputError

PRODUCTS_FILE = "shopping_queries_dataset_products.parquet"
EXAMPLES_FILE = "shopping_queries_dataset_examples.parquet"
LOCALES = ("us", "es", "jp")
VERSIONS = ("small", "large")
# What a vector of a product should know first comes first, since encoders cut long texts: bullets are shorter than
# descriptions and there more often.
DESCRIPTION_COLUMNS = ("product_brand", "product_color", "product_bullet_point", "product_description")
PRODUCT_COLUMNS = ("product_id", "product_title", *DESCRIPTION_COLUMNS, "product_locale")
EXAMPLE_COLUMNS = ("query", "query_id", "product_id", "product_locale", "esci_label", "split")
# The gains of the benchmark's own nDCG (arXiv 2206.06588, section 4.1): `min_relevance: 0.1` chooses E and S, 1 chooses E.
GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
TAUGHT = ("E", "S")  # CAT-ID², section 4.1
_LABELS = {"E": "E", "S": "S", "C": "C", "I": "I"} | {
    name: name[0] for name in ("Exact", "Substitute", "Complement", "Irrelevant")
}
TEXTS = pa.schema([("product_id", pa.string()), ("title", pa.string()), ("description", pa.string())])
JUDGEMENTS = pa.schema([(n, pa.string()) for n in ("query_id", "query", "product_id", "esci_label", "split")])


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{what} {value!r}: expected one of {', '.join(choices)}")


def example_columns(version: str) -> tuple[str, ...]:
    """The columns of the examples file that `judgements` reads."""
    check_choice("version", version, VERSIONS)
    return (*EXAMPLE_COLUMNS, f"{version}_version")


def product_texts(table: pa.Table, *, locale: str) -> pa.Table:
    """TEXTS of the rows of one locale: the title, and as description brand, colour, bullets and description joined by ". ".

    `table`: PRODUCT_COLUMNS. HTML is stripped; what is then empty is null. Raises InputError for a missing column.
    """
    require_columns(table, PRODUCT_COLUMNS, what=PRODUCTS_FILE)
    table = table.filter(pc.equal(string_column(table, "product_locale"), locale))
    description = joined([plain_text(string_column(table, name)) for name in DESCRIPTION_COLUMNS])
    columns = [
        string_column(table, "product_id"),
        plain_text(string_column(table, "product_title")),
        or_null(description),
    ]
    return pa.table(columns, schema=TEXTS)


def judgements(table: pa.Table, *, locale: str, version: str) -> pa.Table:
    """JUDGEMENTS of one locale and version, labels as their letters E, S, C, I.

    `table`: `example_columns(version)`; version flags are 0 or 1. Labels may be letters or the words that mirrors write.
    Raises InputError for a missing column, another label, or a split that is neither train nor test.
    """
    require_columns(table, example_columns(version), what=EXAMPLES_FILE)
    chosen = pc.and_(
        pc.equal(string_column(table, "product_locale"), locale),
        pc.equal(table[f"{version}_version"].combine_chunks().cast(pa.int64()), 1),
    )
    table = table.filter(chosen)
    label = string_column(table, "esci_label")
    place = pc.index_in(label, pa.array(list(_LABELS)))
    _refuse_others("esci_label", label, pc.is_valid(place), "E, S, C or I")
    split = string_column(table, "split")
    _refuse_others("split", split, pc.is_in(split, pa.array(["train", "test"])), "train or test")
    columns = {name: string_column(table, name) for name in ("query_id", "query", "product_id")}
    columns["query"] = _squeezed(columns["query"])
    columns |= {"esci_label": pa.array(list(_LABELS.values())).take(place), "split": split}
    return pa.table([columns[name] for name in JUDGEMENTS.names], schema=JUDGEMENTS)


def _refuse_others(name: str, column: pa.Array, good: pa.Array, expected: str) -> None:
    wrong = column.filter(pc.invert(good))
    if len(wrong):
        values = ", ".join(sorted(repr(value) for value in wrong.unique().to_pylist()[:5]))
        raise InputError(f"{EXAMPLES_FILE}: column {name} holds {values} in {len(wrong)} rows; expected {expected}")


def plain_text(column: pa.Array) -> pa.Array:
    """Strings without HTML: scripts, comments and tags fall, the common entities become characters, spaces are squeezed.

    A tag begins with a letter, so "3 < 5" stays. Strings without anything left become null.
    """
    for pattern in (r"(?is)<(?:script|style)\b.*?</(?:script|style)\s*>", r"(?s)<!--.*?-->", r"(?i)</?[a-z][^<>]*>"):
        column = pc.replace_substring_regex(column, pattern, " ")
    for entity, character in _ENTITIES:
        column = pc.replace_substring(column, entity, character)
    return or_null(_squeezed(column))


_ENTITIES = (
    ("&nbsp;", " "), ("&quot;", '"'), ("&#34;", '"'), ("&#39;", "'"), ("&apos;", "'"), ("&lt;", "<"), ("&gt;", ">"),
    ("&amp;", "&"),
)  # fmt: skip


def _squeezed(column: pa.Array) -> pa.Array:
    # RE2's \s is ASCII; \pZ is every other space, the ideographic one of Japanese titles among them.
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(column, r"[\s\pZ]+", " "))
