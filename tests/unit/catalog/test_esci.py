"""ESCI's columns and the paper's rules on tables in memory, against the rules written out row by row."""

import io
import json

import pyarrow as pa
import pytest

from catid2_ray.catalog.sources import category_lines, esci, esci_rules
from catid2_ray.catalog.sources.esci_rules import Rules, is_validation, prepare_part, query_counts
from catid2_ray.errors import InputError
from tests.esci_sample import write_sample
from tests.oracles import esci as oracle


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("esci") / "source")


def prepared(sample, locale, version, rules):
    texts = esci.product_texts(sample.products, locale=locale)
    judged = esci.judgements(sample.examples, locale=locale, version=version)
    block = "\n".join(json.dumps(line) for line in sample.lines).encode()
    lines = category_lines.read_lines(block).table
    lines = lines.filter([value in (None, locale) for value in lines["locale"].to_pylist()])
    return prepare_part(texts, lines, judged, rules)


@pytest.mark.parametrize("locale", esci.LOCALES)
@pytest.mark.parametrize(
    "version, rules",
    [
        ("small", Rules("judged", 0.0, 0, False)),
        ("large", Rules("judged", 0.2, 3, False)),
        ("small", Rules("all", 0.3, 0, True)),
    ],
)
def test_the_rules_equal_the_oracle(sample, locale, version, rules):
    part = prepared(sample, locale, version, rules)
    rows = (sample.products.to_pylist(), sample.examples.to_pylist(), sample.lines)
    kept, pairs = oracle.prepare(*rows, locale=locale, version=version, **rules._asdict())
    found = part.products.to_pylist()
    assert {row["product_id"]: (row["title"], row["category_path"]) for row in found} == kept
    assert len(found) == len(kept) == part.counts["documents"]
    found = part.pairs.to_pylist()
    assert {(row["query_id"], row["product_id"], row["split"]): row["esci_label"] for row in found} == pairs
    assert len(found) == len(pairs) and all(row["relevance"] == esci.GAINS[row["esci_label"]] for row in found)
    counts = part.counts + query_counts(part.queries)
    for split in ("train", "validation", "test"):
        labels = [label for (_, _, of), label in pairs.items() if of == split]
        assert [counts[f"{split}_{label}"] for label in "ESCI"] == [labels.count(label) for label in "ESCI"]
        asked = {query for (query, _, of), label in pairs.items() if of == split and label in "ES"}
        assert counts[f"{split}_queries"] == len(asked) and (asked or split == "validation" and not rules.validation)
    taught = {row["product_id"] for row in found if row["split"] == "train" and row["esci_label"] in "ES"}
    unseen = {row["product_id"] for row in found if row["split"] == "test"} - taught
    assert bool(unseen) == rules.keep_unseen
    if not rules.keep_unseen:
        assert counts["test_unseen"] > 0
    assert (
        sum(count for name, count in counts.items() if name.startswith("dropped: ")) + counts["documents"]
        == (counts["products_in_corpus"])
    )


def test_a_result_is_a_function_of_the_set_of_rows(sample):
    rules = Rules("judged", 0.2, 0, False)
    first = prepared(sample, "us", "large", rules)
    turned = sample._replace(
        products=sample.products.take(list(range(sample.products.num_rows))[::-1]),
        examples=sample.examples.take(list(range(sample.examples.num_rows))[::-1]),
        lines=sample.lines[::-1],
    )
    second = prepared(turned, "us", "large", rules)
    assert first.products == second.products and first.pairs == second.pairs and first.counts == second.counts


def test_texts_lose_html_and_keep_their_script():
    columns = {name: [None, None, None] for name in esci.PRODUCT_COLUMNS} | {
        "product_id": ["a", "b", "c"],
        "product_title": ["<b>Caf&eacute;</b> &amp; T\u3000<br/>5 < 6 &lt;p&gt;", "折りたたみ傘\u3000黒", " <i></i> "],
        "product_brand": ["ACME", None, ""],
        "product_bullet_point": ["one\ntwo", "軽量<br>丈夫", None],
        "product_description": ["<style>p {x}</style><!-- no --><p class='x'>Long\ttext</p>", None, "<p> </p>"],
        "product_locale": ["us"] * 3,
    }
    found = esci.product_texts(pa.table(columns), locale="us").to_pylist()
    assert found[0] == {
        "product_id": "a",
        "title": "Caf&eacute; & T 5 < 6 <p>",
        "description": "ACME. one two. Long text",
    }
    assert found[1]["title"] == "折りたたみ傘 黒" and found[1]["description"] == "軽量 丈夫"
    assert found[2]["title"] is None and found[2]["description"] is None


def test_columns_labels_and_splits_are_checked(sample):
    with pytest.raises(InputError, match="column product_color is missing; found columns product_id"):
        esci.product_texts(sample.products.drop_columns("product_color"), locale="us")
    for name, value, expected in (
        ("esci_label", "X", "expected E, S, C or I"),
        ("split", "dev", "expected train or test"),
    ):
        place = sample.examples.schema.get_field_index(name)
        wrong = sample.examples.set_column(place, name, pa.array([value] * sample.examples.num_rows))
        with pytest.raises(InputError, match=f"column {name} holds '{value}' in .* rows; {expected}"):
            esci.judgements(wrong, locale="us", version="small")
    with pytest.raises(InputError, match="version 'medium': expected one of small, large"):
        esci.judgements(sample.examples, locale="us", version="medium")
    words = {"E": "Exact", "S": "Substitute", "C": "Complement", "I": "Irrelevant"}
    place = sample.examples.schema.get_field_index("esci_label")
    spelled = sample.examples.set_column(
        place, "esci_label", pa.array([words[x] for x in sample.examples["esci_label"].to_pylist()])
    )
    read = [esci.judgements(table, locale="jp", version="small") for table in (spelled, sample.examples)]
    assert read[0] == read[1] and set(read[0]["esci_label"].to_pylist()) == set("ESCI")


LINES = [
    b'{"asin": "A", "locale": "US", "category": ["x", "y", null], "attrs": {"a": 1}}',
    b'{"product_id": "B", "category": [], "attrs": {"b": [1]}}',
    b'{"asin": "C", "category": null}',
    '{"asin": "Ｄ", "category": ["ホーム＆キッチン", "傘"]}'.encode(),
    b"",
]
DAMAGED = [
    b"no json",
    b"[1, 2]",
    b'{"asin": 7, "category": ["x"]}',
    b'{"asin": "E", "category": "x > y"}',
    b'{"asin": "F", "category": ["\\ud83d"]}',
    b'{"category": ["x"]}',
    b'{"asin": "", "category": ["x"]}',
    b'{"asin": "G", "categ',
]


@pytest.mark.parametrize("damaged", [[], DAMAGED, *[[line] for line in DAMAGED]])
def test_category_lines_equal_the_oracle(damaged):
    block = b"\n".join([*LINES[:3], *damaged, *LINES[3:]])
    found = category_lines.read_lines(block)
    expected = oracle.category_lines(block)
    assert [tuple(row.values()) for row in found.table.to_pylist()] == expected and len(expected) == 4
    assert (found.lines, found.unreadable) == (4 + len(damaged), len(damaged))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_blocks_are_whole_lines(size, monkeypatch):
    text = b"\n".join(LINES * 3)
    pieces = list(category_lines.blocks(io.BytesIO(text), size=size))
    assert b"".join(pieces).strip() == text.strip() and all(piece.endswith(b"\n") for piece in pieces[:-1])
    monkeypatch.setattr(category_lines, "_LONGEST_LINE", 100)
    with pytest.raises(InputError, match="no line break in .* expected JSON lines, one object per product"):
        list(category_lines.blocks(io.BytesIO(b"x" * 300), size=50))


def test_the_validation_share_is_met_and_seeded():
    names = pa.array([str(number) for number in range(20_000)])
    chosen = is_validation(names, share=0.1, seed=0)
    assert 0.09 < chosen.mean() < 0.11 and not is_validation(names, share=0, seed=0).any()
    assert (chosen & is_validation(names, share=0.1, seed=1)).mean() < 0.02
    assert (chosen <= is_validation(names, share=0.2, seed=0)).all()


def test_a_query_in_two_splits_is_refused():
    queries = pa.table([["7", "7", "8"], ["test", "validation", "train"], [True] * 3], schema=esci_rules.QUERIES)
    with pytest.raises(InputError, match=r"1 queries are in the train and in the test split, first query_id \['7'\]"):
        query_counts(queries)
