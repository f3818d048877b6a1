"""New products between releases: the codes of the frozen quantizer, the nearest free last code, vectors of the encoder."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.catalog.text import LsaEncoder
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.identifiers import ledger
from catid2_ray.on_ray.serve.newcomers import Newcomers, asked_again
from catid2_ray.quantizer.adapter import LinearAdapter
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.trie import Trie

TITLES = [
    "oak door",
    "oak table",
    "steel hinge",
    "steel pipe",
    "garden hose",
    "garden chair",
    "copper pipe",
    "brass hinge",
]
SPACE = DocidSpace((3, 4))


@pytest.fixture
def parts(local_store, tmp_path):
    encoder = LsaEncoder.fit(TITLES, width=4, vocabulary=50, seed=0)
    encoder.save(tmp_path / "encoder")
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(width=4, hidden=(8,), latent=3, codes_per_level=SPACE.codes_per_level)
    quantizer.save(tmp_path / "quantizer")
    recipe = Recipe.build({"catalog": {"root": "x"}, "embedding": {"width": 4, "text": ["title"]}}).model_dump(
        mode="json"
    )
    made = {}
    tree = Taxonomy.build({}, depth=3).to_json().encode()
    for kind, folder, files, metrics in (
        ("catalog", None, {"taxonomy.json": tree}, {"width": None}),
        ("embeddings", tmp_path / "encoder", {}, {"width": 4}),
        ("quantizer", tmp_path / "quantizer", {}, {}),
        ("ids", None, {"x": b"x"}, {"ids": "unique", "codes_per_level": list(SPACE.codes_per_level)}),
    ):
        attempt = Attempt(local_store, kind, settings={}, parents={}, recipe=recipe)
        below = attempt.name("encoder") if kind == "embeddings" else attempt.folder
        entries = local_store.upload(folder, below) if folder else []
        entries += [local_store.write_file(attempt.name(name), data) for name, data in files.items()]
        made[kind] = attempt.commit(entries, metrics=metrics)
    return made


def product(product_id, title, **more):
    return {"product_id": product_id, "title": title, **more}


def view_of(codes):
    return LiveTrie(Trie.build(np.array(codes), codes_per_level=SPACE.codes_per_level)).view


def test_a_product_gets_its_codes_or_the_nearest_free_one(local_store, parts):
    newcomers = Newcomers(local_store, parts)
    (made,) = newcomers.prepare(
        [product("n", "oak shelf", columns={"price": 2.0}, value=3.0)], view_of([[0, 0], [1, 0], [2, 0]]), vectors=True
    )
    assert made["columns"] == {"price": 2.0} and made["value"] == 3.0 and made["title"] == "oak shelf"
    np.testing.assert_allclose(made["vector"], newcomers._encode(["oak shelf"])[0])
    head = SPACE.parse(made["docid"])[0]
    residual_BZ = newcomers._coder.encode_padded(torch.tensor([made["vector"]]), rows=16).residual_BZ
    order = torch.cdist(residual_BZ, newcomers._coder.codebooks[-1].detach())[0].argsort().tolist()
    elsewhere = [[(head + 1) % 3, 0]]
    for taken in range(4):
        view = view_of([[head, code] for code in order[:taken]] + elsewhere)
        (other,) = newcomers.prepare([product("n", "oak shelf")], view, vectors=False)
        assert SPACE.parse(other["docid"]) == (head, order[taken]) and "vector" not in other
    twins = newcomers.prepare([product("n", "oak shelf"), product("m", "oak shelf")], view_of(elsewhere), vectors=False)
    assert [SPACE.parse(one["docid"])[1] for one in twins] == order[:2]
    with pytest.raises(InputError, match="all 4 IDs below <a_.> are taken, so product 'n' has no place near its like"):
        newcomers.prepare([product("n", "oak shelf")], view_of([[head, code] for code in range(4)]), vectors=False)


def test_an_id_that_is_sent_along_is_given_to_no_other_product_of_the_change(local_store, parts):
    newcomers, view = Newcomers(local_store, parts), view_of([[0, 0], [1, 0], [2, 0]])
    (alone,) = newcomers.prepare([product("n", "oak shelf")], view, vectors=False)
    both = newcomers.prepare([product("n", "oak shelf"), product("m", "x", docid=alone["docid"])], view, vectors=False)
    head, last = SPACE.parse(alone["docid"])
    assert both[1]["docid"] == alone["docid"] and SPACE.parse(both[0]["docid"])[0] == head
    assert SPACE.parse(both[0]["docid"]) not in {(head, last), (head, 0)}, "not m's either, nor one of the release"


def test_vectors_of_newcomers_are_adapted_as_those_of_the_release(local_store, parts, tmp_path):
    plain = Newcomers(local_store, parts).prepare([product("n", "oak shelf")], view_of([[0, 0]]), vectors=True)
    adapter = LinearAdapter(4)
    with torch.no_grad():
        adapter.product_DD += torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    adapter.save(tmp_path / "adapter")
    attempt = Attempt(local_store, "adapter", settings={}, parents={}, recipe={})
    entries = local_store.upload(tmp_path / "adapter", attempt.folder)
    newcomers = Newcomers(local_store, parts | {"adapter": attempt.commit(entries, metrics={"adopted": True})})
    given = [product("n", "oak shelf"), product("m", "x", vector=plain[0]["vector"])]
    made = newcomers.prepare(given, view_of([[0, 0]]), vectors=True)
    found = [one["vector"] for one in made]
    assert asked_again(made[1]) == given[1], "the vector as it was sent, not as it is searched"
    expected = adapter.products([plain[0]["vector"]])[0].tolist()
    assert found == [expected, expected], "whether the text or the encoder's vector came"
    with pytest.raises(InputError, match="the vector of product 'n' has 2 numbers, the release's 4"):
        newcomers.prepare([product("n", "x", vector=[1.0, 2.0])], view_of([[0, 0]]), vectors=True)


def test_inserted_and_withdrawn_products_keep_their_ids(local_store, parts):
    newcomers = Newcomers(local_store, parts)
    live = LiveTrie(Trie.build(np.array([[0, 0], [1, 0], [2, 0]]), codes_per_level=SPACE.codes_per_level))
    seen = set()
    for number in range(3):
        (made,) = newcomers.prepare([product(f"n{number}", "oak shelf")], live.view, vectors=False)
        seen.add(made["docid"])
        live.insert(f"n{number}", SPACE.parse(made["docid"]))
        live.withdraw([f"n{number}"])
    assert len(seen) == 3


def test_the_id_of_a_product_that_left_waits_for_it(local_store, parts):
    elsewhere = view_of([[0, 0], [1, 0], [2, 0]])
    (free,) = Newcomers(local_store, parts).prepare([product("n", "oak shelf")], elsewhere, vectors=False)
    nearest = SPACE.parse(free["docid"])
    rows = pa.table(
        [["left", "long ago"], [list(nearest), [1, 3]], ["retired"] * 2, [3, 1], [5, 3], [0.0, 0.0]],
        names=ledger.schema(2).names,
    ).cast(ledger.schema(2))
    attempt = Attempt(local_store, "ids", settings={"n": 3}, parents={}, recipe=parts["ids"].recipe)
    parts["ids"] = attempt.commit(
        [local_store.write_table(attempt.name("ledger/part-00000.parquet"), rows)],
        metrics={"ids": "unique", "codes_per_level": list(SPACE.codes_per_level), "number": 3},
    )
    newcomers = Newcomers(local_store, parts)
    (other,) = newcomers.prepare([product("n", "oak shelf")], elsewhere, vectors=False)
    assert other["docid"] != free["docid"] and SPACE.parse(other["docid"])[0] == nearest[0]
    back, chosen = newcomers.prepare(
        [product("left", "anything"), product("m", "x", docid="<a_1><b_3>")], elsewhere, vectors=False
    )
    assert back["docid"] == free["docid"] and chosen["docid"] == "<a_1><b_3>", "its quarantine is over"
    assert newcomers.may_have(free["docid"], "left", elsewhere)
    assert not newcomers.may_have(free["docid"], "m", elsewhere)
    with pytest.raises(InputError, match="waits for product 'left', which left .*; send another docid for product 'm'"):
        newcomers.prepare([product("m", "x", docid=free["docid"])], elsewhere, vectors=False)


def test_what_the_caller_gives_is_kept(local_store, parts):
    newcomers = Newcomers(Store(local_store.uri), parts)
    given = product("n", "anything", docid="<a_2><b_3>", vector=[1.0, 0, 0, 0])
    (kept,) = newcomers.prepare([given], view_of([[0, 0]]), vectors=True)
    assert kept == given | {"said": {"vector": None}}
    assert asked_again(kept) == {name: given[name] for name in ("product_id", "title", "vector")}
    more = {"description": "d", "category_path": ["x"], "value": 2.0, "columns": {"price": 1.0}}
    (described,) = newcomers.prepare([product("n", "oak shelf", **more)], view_of([[0, 0]]), vectors=True)
    assert asked_again(described) == product("n", "oak shelf", **more), "another release makes it anew of this"
    assert asked_again(product("n", "of an older version", docid="<a_2><b_3>", vector=[1.0])) == product(
        "n", "of an older version"
    )
    view = view_of([[0, 0], [2, 1]])
    free = {f"<a_{a}><b_{b}>" for a in range(3) for b in range(4)} - {"<a_0><b_0>", "<a_2><b_1>"}
    assert {
        d for d in [*free, "<a_0><b_0>", "<a_2><b_1>", "<a_9><b_0>", "x"] if newcomers.may_have(d, "n", view)
    } == free
    with pytest.raises(InputError, match="the vector of product 'n' has 2 numbers, the release's 4"):
        newcomers.prepare([product("n", "x", vector=[1.0, 2.0])], view_of([[0, 0]]), vectors=True)
    for unusable in ([1e39, 0, 0, 0], [0, 0, 0, 0]):
        with pytest.raises(InputError, match="the vector of product 'n' must be finite as float32 and not all zeros"):
            newcomers.prepare([product("n", "x", vector=unusable)], view_of([[0, 0]]), vectors=True)
    parts["catalog"].metrics["width"] = 4
    with pytest.raises(InputError, match="no encoder for new products: send the product's vector"):
        Newcomers(local_store, parts).prepare([product("n", "x")], view_of([[0, 0]]), vectors=False)
    parts["ids"].metrics["ids"] = "suffix"
    with pytest.raises(InputError, match="IDs of kind 'suffix' .* cannot be made one by one: send the docid"):
        Newcomers(local_store, parts).prepare([product("n", "x", vector=[1.0] * 4)], view_of([[0, 0]]), vectors=False)


@pytest.mark.parametrize("title", ["", "???", "\u200b"])
def test_what_the_door_would_set_aside_is_refused(local_store, parts, title):
    """A title that says nothing has a vector like no other's, which came first for queries of unknown words."""
    newcomers, view = Newcomers(local_store, parts), view_of([[0, 0]])
    with pytest.raises(InputError, match="the title of product 'n' needs at least one letter or digit"):
        newcomers.prepare([product("m", "oak"), product("n", title)], view, vectors=False)
    with pytest.raises(InputError, match="a product id is more than blanks, found ' '"):
        newcomers.prepare([product(" ", "oak shelf")], view, vectors=False)


def test_a_category_path_is_the_filter_column_of_that_name_too(local_store, parts):
    """Else a new product is missing where its category is asked for."""
    newcomers = Newcomers(local_store, parts)
    paths = pa.array([["Home"]], pa.list_(pa.string()))
    index = FilterIndex(pa.table({"product_id": ["p"], "category_path": paths, "price": [1.0]}))
    trie = Trie.build(np.array([[0, 0]]), codes_per_level=SPACE.codes_per_level)
    view = LiveTrie(trie, product_ids=["p"], index=index).view
    given = [
        product("a", "oak shelf", category_path=[" Home ", "Shelves", "", "Oak"], columns={"price": 2.0}),
        product("b", "oak shelf", category_path=["Home", "1", "2", "3"]),
        product("c", "oak shelf", category_path=["Home"], columns={"category_path": ["Garden"]}),
        product("d", "oak shelf"),
    ]
    made = newcomers.prepare(given, view, vectors=False)
    assert [one.get("columns") for one in made] == [
        {"category_path": ["Home", "Shelves"], "price": 2.0}, {"category_path": ["Home", "1", "2"]},
        {"category_path": ["Garden"]}, None,
    ]  # fmt: skip
    assert list(map(asked_again, made)) == given, "another release may have no such column"
    plain = newcomers.prepare(given[:2], view_of([[0, 0]]), vectors=False)
    assert [one.get("columns") for one in plain] == [{"price": 2.0}, None]
