"""The serving part in trie order, whatever the parts and ranges: vectors, values, columns, words of the right rows."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.release import PARTS as PARTS_OF_A_RELEASE
from catid2_ray.artifacts.release import fetch
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, RecipeError
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.on_ray.machine.arrays import fixed_lists
from catid2_ray.on_ray.stages import evaluate, node_vectors
from catid2_ray.on_ray.stages import lay_out as serving
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import ProductNames
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

SPACE, ROWS, PARTS = DocidSpace((5, 6, 7)), 120, 3
WORDS = np.array(["oak", "steel", "hinge", "pipe", "door", "hose"])


def one_after_the_other(handler_class, arguments, specs, **_):
    handler = handler_class(**arguments)
    return [handler({**spec, "position": position}) for position, spec in enumerate(specs)]


@pytest.fixture
def parents(local_store, make):
    """Catalogue, embeddings and IDs of 120 products in three parts; some products share an ID."""
    random = np.random.default_rng(3)
    names = [f"p{i:03d}" for i in random.permutation(ROWS)]
    packed = random.integers(0, 80, ROWS)
    table = pa.table(
        {
            "product_id": names,
            "title": [" ".join(random.choice(WORDS, 3)) for _ in names],
            "description": [None] * ROWS,
            "value": pa.array([None if i % 7 == 0 else float(i) for i in range(ROWS)], pa.float32()),
            "price": random.random(ROWS),
            "market": [["us"]] * ROWS,
        }
    )
    vectors = random.normal(size=(ROWS, 8)).astype(np.float32) * 3
    catalog, embeddings, ids = {}, {}, {}
    rows_of = np.array_split(np.arange(ROWS), PARTS)
    order = []
    for part, rows in enumerate(rows_of):
        rows = rows[np.argsort([names[row] for row in rows])]
        order += rows.tolist()
        file, chosen = f"part-{part:05d}.parquet", table.take(pa.array(rows))
        catalog[file] = chosen
        embeddings[file] = pa.table(
            {"product_id": chosen["product_id"], "embedding": fixed_lists(vectors[rows], pa.float32())}
        )
        codes = fixed_lists(SPACE.unpack(packed[rows]).astype(np.int32), pa.int32())
        ids[file] = pa.table({"product_id": chosen["product_id"], "codes": codes})
    trie_order = np.array(order)[np.argsort(packed[order], kind="stable")]
    made = {}
    for kind, files in (("catalog", catalog), ("embeddings", embeddings), ("ids", ids)):
        attempt = Attempt(local_store, kind, settings={}, parents={}, recipe={})
        entries = [
            {**local_store.write_table(attempt.name(name), rows), "part": part}
            for part, (name, rows) in enumerate(files.items())
        ]
        if kind == "ids":
            trie = Trie.from_sorted(np.sort(packed), codes_per_level=SPACE.codes_per_level, shared=True)
            trie.save(local_store.path(attempt.name("trie")))
            named = table.take(pa.array(trie_order)).select(["product_id", "title"])
            with pa.ipc.new_file(local_store.path(attempt.name("products.arrow")), named.schema) as writer:
                writer.write_table(named)
            size, name = local_store.sizes(attempt.folder)["products.arrow"], attempt.name("products.arrow")
            entries.append({"name": name, "bytes": size, "sha256": local_store.sha256(name)})
            entries += [
                {
                    "name": attempt.name(f"trie/{name}"),
                    "bytes": size,
                    "sha256": local_store.sha256(attempt.name(f"trie/{name}")),
                }
                for name, size in local_store.sizes(attempt.name("trie")).items()
            ]
        metrics = {"width": None, "codes_per_level": list(SPACE.codes_per_level)}
        made[kind] = attempt.commit(entries, rows=ROWS, metrics=metrics)
    return made, table.take(pa.array(trie_order)), vectors[trie_order]


def run(store, parents, monkeypatch, stage=serving, **sections):
    monkeypatch.setattr(serving, "map_parts", one_after_the_other)
    values = {"catalog": {"root": "x", "filter_columns": {"price": "float", "market": "list<string>"}}}
    recipe = Recipe.build(values | sections)

    def produce(kind, settings, parts, work):
        digests = {role: part.digest for role, part in parts.items()}
        return work(Attempt(store, kind, settings=settings, parents=digests, recipe={}))

    return stage.run(SimpleNamespace(recipe=recipe, store=store, produce=produce), parents)


ALL = {"serving": {"expansion": {"lexical_weight": 1.0}, "filters": ["market", "price"]}}


@pytest.mark.parametrize("range_rows", [1000, 50, 7])
def test_every_row_is_in_its_place(local_store, parents, monkeypatch, tmp_path, range_rows):
    made, table, vectors_ND = parents
    monkeypatch.setattr(serving, "RANGE_ROWS", range_rows)
    manifest = run(local_store, made, monkeypatch, **ALL)
    folder = fetch(local_store, manifest, tmp_path)
    names = ProductNames.open(folder, table["product_id"])
    assert names.rows(table["product_id"].to_pylist()[::9] + ["nobody"]).tolist() == [*range(0, ROWS, 9), -1]
    stored = VectorStore.open(folder / "vectors")
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(stored.vectors_ND, unit_ND, atol=1e-3)
    assert stored.normalized
    value_N = np.load(folder / "value.npy")
    np.testing.assert_array_equal(value_N, table["value"].fill_null(-np.inf).to_numpy())
    columns = pa.ipc.open_file(str(folder / "columns.arrow")).read_all()
    assert columns.to_pylist() == table.select(["market", "price"]).to_pylist()
    index = LexicalIndex.open(folder / "lexical")
    oracle = Bm25([f"{row:03d}" for row in range(ROWS)], table["title"].to_pylist())
    expected = oracle.scores("oak hinge")
    np.testing.assert_allclose(index.scores(["oak hinge"], np.arange(ROWS)[None])[0], expected, rtol=1e-5)
    assert local_store.names(f"{manifest.folder}/exchange") == []


def test_ranges_change_no_byte(local_store, parents, monkeypatch):
    digests = set()
    for range_rows in (1000, 13):
        monkeypatch.setattr(serving, "RANGE_ROWS", range_rows)
        manifest = run(local_store, parents[0], monkeypatch, **ALL)
        digests |= {(entry["name"], entry["sha256"]) for entry in manifest.files if "columns" not in entry["name"]}
        local_store.delete_folder(f"artifacts/serving/{manifest.key}")
    assert len({name for name, _ in digests}) == len(digests) == 11


def test_what_is_not_needed_is_not_made(local_store, parents, monkeypatch):
    manifest = run(local_store, parents[0], monkeypatch, evaluation={"beam_width": 9})
    assert [entry["name"] for entry in manifest.files] == ["product_names.npy", "serving.json"] and manifest.settings[
        "beam_width"
    ] == 9
    assert json.loads(local_store.read(manifest.file("serving.json"))) == manifest.settings
    by_value = {"serving": {"expansion": {"dense": "none", "order": "value"}, "beam_width": [1, 2, 3, 4]}}
    manifest = run(local_store, parents[0], monkeypatch, **by_value)
    assert [entry["name"] for entry in manifest.files] == ["product_names.npy", "serving.json", "value.npy"]
    assert manifest.settings["beam_width"] == [1, 2, 3, 4] and manifest.settings["encoder"] is None


def test_given_vectors_need_a_named_encoder(local_store, parents, monkeypatch):
    parents[0]["catalog"].metrics["width"] = 8
    with pytest.raises(RecipeError, match=r"no encoder is known for queries: set serving.query_encoder"):
        run(local_store, parents[0], monkeypatch, **ALL)
    named = {"serving": {**ALL["serving"], "query_encoder": "some/model"}}
    assert run(local_store, parents[0], monkeypatch, **named).settings["encoder"] == {
        "name": "some/model",
        "tokens": 64,
    }
    with pytest.raises(RecipeError, match="serving.query_encoder is 'lsa', but the products' vectors"):
        run(local_store, parents[0], monkeypatch, serving={**ALL["serving"], "query_encoder": "lsa"})


def test_parts_that_name_other_products_are_refused(local_store, parents, monkeypatch, make):
    made = dict(parents[0])
    swapped = Attempt(local_store, "embeddings", settings={"swapped": 1}, parents={}, recipe={})
    names = [entry["name"] for entry in made["embeddings"].parts()]
    tables = [local_store.read_table(made["embeddings"].file(name)) for name in names]
    files = [local_store.write_table(swapped.name(name), table) for name, table in zip(names, tables[::-1])]
    made["embeddings"] = swapped.commit(files, metrics={"width": 8})
    with pytest.raises(ArtifactError, match="part 0 of ids and of embeddings name different products"):
        run(local_store, made, monkeypatch, **ALL)


def test_node_vectors_are_the_same_whatever_the_ranges(local_store, parents, monkeypatch, tmp_path):
    made, _, vectors_ND = parents
    digests = set()
    for range_rows in (1000, 13):
        monkeypatch.setattr(serving, "RANGE_ROWS", range_rows)
        manifest = run(local_store, made, monkeypatch, node_vectors, serving={"node_depth": 2})
        digests.add(manifest.digest)
        folder = fetch(local_store, manifest, tmp_path)
        opened, trie = NodeVectors.open(folder), Trie.open(fetch(local_store, made["ids"], tmp_path) / "trie")
        opened.check(trie)
        assert local_store.names(f"{manifest.folder}/exchange") == []
        local_store.delete_folder(f"artifacts/node_vectors/{manifest.key}") if range_rows > 13 else None
    assert len(digests) == 1 and manifest.settings == {"depth": 2} and set(manifest.parents) == {"ids", "embeddings"}
    assert manifest.metrics["bytes"] == opened.nbytes and manifest.metrics["nodes"] == [trie.nodes(1), trie.nodes(2)]
    unit_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float16)
    start, end = trie.row_start[2][[0, 1]]
    np.testing.assert_array_equal(opened.means[1][0], unit_ND[start:end].astype(float).mean(0).astype(np.float16))


def test_node_vectors_are_left_out_with_a_reason(local_store, parents, monkeypatch, capsys):
    assert run(local_store, parents[0], monkeypatch, node_vectors, serving={"node_depth": 0}) is None
    parents[0]["catalog"].metrics["width"] = 8
    assert run(local_store, parents[0], monkeypatch, node_vectors) is None
    said = capsys.readouterr()
    assert "serving.node_depth is 0" in said.out + said.err and "names no encoder for queries" in said.out + said.err
    named = {"query_encoder": "some/model", "node_depth": 9}
    assert run(local_store, parents[0], monkeypatch, node_vectors, serving=named).settings == {"depth": 3}


def test_a_search_that_looks_ahead_needs_node_vectors_and_lays_out_vectors(local_store, parents, monkeypatch):
    asked = {"search": "lookahead", "lookahead": {"lexical_weight": 0.1}}
    made = dict(parents[0])
    manifest = run(local_store, made, monkeypatch, serving=asked)
    # As before there was a choice, so that what was made then keeps its key.
    assert not {"search", "lookahead", "node_depth"} & set(manifest.settings) and manifest.settings["encoder"] is None
    made["node_vectors"] = run(local_store, made, monkeypatch, node_vectors)
    manifest = run(local_store, made, monkeypatch, serving=asked)
    assert manifest.metrics["made"] == ["lexical", "vectors"] and manifest.settings["encoder"]["name"] == "lsa"
    assert manifest.settings["lookahead"] == {"logp_weight": 0.003, "vector_weight": 1.0, "lexical_weight": 0.1}
    settings = releases.retriever_settings(made | {"serving": manifest, **_GENERATOR}, release="r")
    assert settings["search"] == "lookahead" and settings["lookahead"] == manifest.settings["lookahead"]
    beam = run(local_store, made, monkeypatch, serving={"search": "beam"})
    assert beam.metrics["made"] == [] and "lookahead" not in beam.settings


@pytest.mark.parametrize(
    "methods, search, read",
    [
        (["served"], "lookahead", {"serving", "node_vectors"}),
        (["served"], "beam", {"serving"}),
        (["lookahead"], "beam", {"node_vectors"}),
        (["beam", "bm25"], "lookahead", set()),
    ],
)
def test_an_evaluation_is_made_anew_where_node_vectors_matter(local_store, parents, methods, search, read):
    recipe = Recipe.build({"catalog": {"root": "x"}, "serving": {"search": search}, "evaluation": {"methods": methods}})
    parts = dict.fromkeys(PARTS_OF_A_RELEASE, parents[0]["embeddings"]) | parents[0]
    del parts["mixture"], parts["tuned_encoder"]

    def produce(kind, settings, parts, work):
        return set(parts), settings

    roles, settings = evaluate.run(SimpleNamespace(recipe=recipe, store=local_store, produce=produce), parts)
    assert roles == {"catalog", "pairs", "ids", "examples", "generator"} | read
    assert ("ahead" in settings) == ("lookahead" in methods)
    if "ahead" in settings:
        assert settings["ahead"]["lookahead"]["lexical_weight"] == 0, "what is served by the beam has no index of words"


_GENERATOR = {
    "examples": SimpleNamespace(settings={"query_tokens": 8}),
    "generator": SimpleNamespace(settings={}),
}
