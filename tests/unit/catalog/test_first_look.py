"""What a sample shows: filter types, separators of paths, HTML, languages, columns that have another name."""

import io

import pyarrow as pa
import pytest

from catid2_ray.catalog.first_look import depth_of, filter_type, html_share, language_of, renaming, separator_of
from catid2_ray.catalog.text_files import columns_in
from catid2_ray.errors import InputError


@pytest.mark.parametrize(
    "values, kind",
    [
        ([True, False, None], "bool"),
        ([3, 3, 5], "int"),
        ([3.5, None, 4.0], "float"),
        (["3", "5", "5"], "int"),
        (["007", "012", "007", "012"], "string"),  # numbers keep no zeros
        (["3.5", "4", "1e3"], "float"),
        (["true", "False", "true"], "bool"),
        (['["de"]', '["fr", "de"]'], "list<string>"),
        ([["de"], ["fr"], None], "list<string>"),
        (["Bosch", "Makita", "Bosch", "Makita"], "string"),
    ],
)
def test_types_that_serving_filters_by(values, kind):
    assert filter_type(pa.array(values)) == (kind, "")
    assert filter_type(pa.chunked_array([pa.array(values)]))[0] == kind


@pytest.mark.parametrize(
    "values, why",
    [
        ([None, None], "empty"),
        (["a", "a"], "one value throughout"),
        ([f"https://shop/{row}" for row in range(60)], "nearly every value differs"),
        (list(range(60)), "a value of its own for every product"),
        (["long " * 20, "texts " * 20] * 2, "long texts"),
        ([[1.0], [2.0]], "a list of double"),
        ([{"a": 1}, {"a": 2}], "struct<a: int64>"),
    ],
)
def test_columns_that_are_nothing_to_filter_by_have_a_reason(values, why):
    assert filter_type(pa.array(values)) == (None, why)


@pytest.mark.parametrize("separator", [" > ", ">", " / ", "|", "\\"])
def test_paths_are_cut_where_most_are(separator):
    paths = pa.array([separator.join(["Tools", "Hand tools", "Saws"]), separator.join(["Garden", "Hoses"]), None])
    assert separator_of(paths) == separator and depth_of(paths, separator) == 3
    assert depth_of(pa.array([["a"], ["a", "b"]]), None) == 2


def test_html_languages_and_other_names():
    assert html_share(pa.array(["<b>oak</b>", "a &lt; b", "5 < 6 > 4", None])) == pytest.approx(2 / 3)
    assert html_share(pa.array([None], pa.string())) == 0
    assert language_of(pa.array(["The shelf of oak for the wall and the floor"] * 5)) == "Texts look English."
    assert language_of(pa.array(["Regal aus Eiche für die Wand und den Flur mit Haken"] * 5)) == "Texts look German."
    assert language_of(pa.array(["折りたたみ傘 防水"] * 5)) == "Texts look Japanese (100%)."
    assert language_of(pa.array(["X-12"])) == ""
    assert renaming(["SKU", "Name", "x"], ["product_id", "title"]) == "Rename SKU to product_id, Name to title?"
    assert renaming(["x"], ["title"]) == ""


def test_columns_of_text_files():
    def of(text, format):
        return columns_in(lambda: io.BytesIO(text.encode()), format=format, where="file")

    assert of("product_id,title,price\n1,oak,3\n", "csv") == {"product_id": None, "title": None, "price": None}
    lines = (
        '{"id": 1, "price": 2, "tags": ["a"]}\n{"id": 2, "price": 2.5, "sale": true, "of": {}}\n{"id": 3, "mixed": 1}\n'
    )
    assert of(lines, "jsonl") == {"id": "int", "price": "float", "tags": "list<string>", "sale": "bool", "of": "string"}
    with pytest.raises(InputError, match="file cannot be read as jsonl"):
        of("{oak}\n{}\n{}\n", "jsonl")
