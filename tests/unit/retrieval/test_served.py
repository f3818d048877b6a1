"""What a release says of serving is what the retriever does: early stop, re-scoring, filters per query, live changes."""

import json

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.errors import ArtifactError, InputError, QueryError, ReleaseError
from catid2_ray.evaluation.diagnosis import diagnose
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.lexical import Block, LexicalIndex, count_words
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import LiveTensors
from catid2_ray.retrieval.vectors import VectorStore
from tests.unit.retrieval.conftest import TITLES

WORDS = sorted({word for title in TITLES for word in title.split()})


def encode(texts) -> np.ndarray:
    """One dimension a word: near titles share words."""
    vector_BD = np.array([[text.split().count(word) + 1e-3 for word in WORDS] for text in texts], np.float32)
    return vector_BD / np.linalg.norm(vector_BD, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def served(folder, parts, tmp_path_factory):
    """The release's folder with vectors, values, columns and words, and settings that use them all."""
    titles, into = parts[4], tmp_path_factory.mktemp("served")
    for name in ("generator", "trie", "products.arrow"):
        (into / name).symlink_to(folder / name)
    VectorStore.write(into / "vectors", [encode(titles)], normalize=True)
    np.save(into / "value.npy", np.arange(6, dtype=np.float32))
    columns = pa.table(
        {"material": [title.split()[0] for title in titles], "price": [float(len(title)) for title in titles]}
    )
    with pa.ipc.new_file(into / "columns.arrow", columns.schema) as writer:
        writer.write_table(columns)
    counted = count_words(titles)
    names = sorted(set(counted.words.to_pylist()))
    term_P = np.array([names.index(word) for word in counted.words.to_pylist()], np.int32)
    LexicalIndex.write(
        into / "lexical", [Block(counted.count_N, counted.length_N, term_P, counted.times)], vocabulary=pa.array(names),
        frequency_V=np.bincount(term_P), rows=6, mean_length=float(counted.length_N.mean()),
    )  # fmt: skip
    settings = json.loads((folder / "retriever.json").read_text())
    settings |= {"beam_width": [4, 8], "stop_level": 1, "expansion": {"a": 0.1, "lexical_weight": 0.01, "most": 50}}
    (into / "retriever.json").write_text(
        json.dumps(settings | {"filters": ["material", "price"], "encoder": {"name": "x"}})
    )
    return into


def copy(served, into, **changed):
    """The folder with other settings."""
    for path in served.iterdir():
        if path.name != "retriever.json":
            (into / path.name).symlink_to(path.resolve())
    (into / "retriever.json").write_text(json.dumps(json.loads((served / "retriever.json").read_text()) | changed))
    return into


def names_of(answers) -> list[list[str]]:
    return [[hit.product_id for hit in hits] for hits in answers]


def test_clusters_are_expanded_and_scores_add_up(served, parts):
    retriever = Retriever.open(served, encode_query=encode)
    assert retriever.levels == 1 and retriever.widths == [4, 8]
    answers = retriever.retrieve(TITLES, k=6)
    assert [hits[0].title for hits in answers] == TITLES and all(len(hits) == 6 for hits in answers)
    # Six products lie below four first codes; products of one cluster share its log P.
    for query, hits in zip(TITLES, answers):
        logp = {hit.docid_text[:5]: hit.logp for hit in hits}
        weight = {code: np.exp(value) for code, value in logp.items()}
        for hit in hits:
            assert hit.logp == logp[hit.docid_text[:5]]
            dense = float(encode([query])[0] @ encode([hit.title])[0])
            assert hit.dense == pytest.approx(dense, abs=2e-3)
            path = weight[hit.docid_text[:5]] / sum(weight.values())
            assert hit.score == pytest.approx(np.tanh(dense) + 0.1 * path + 0.01 * hit.lexical, abs=2e-3)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert hits[0].lexical > 0


def test_a_score_is_the_sum_of_features_times_weights_whatever_came_and_is_allowed(served, tmp_path):
    NodeVectors.write(
        tmp_path / "node_vectors", Trie.open(served / "trie"), VectorStore.open(served / "vectors"), depth=1
    )
    ahead = {"search": "lookahead", "lookahead": {"logp_weight": 0.5, "vector_weight": 3.0, "lexical_weight": 0.1}}
    mixed = {"a": 0.3, "path": "root", "dense": "dot", "lexical_weight": 0.05}
    retriever = Retriever.open(copy(served, tmp_path, **ahead, expansion=mixed), encode_query=encode)
    assert retriever.expansion.weights == {"dense": 1.0, "path": 0.3, "BM25": 0.05}
    retriever.insert([Newcomer("new", "copper hose 10 ft")], [[2, 0]], {"material": ["copper"], "price": [5.0]})
    for filters in (None, [{"not": {"products": ["p2"]}}] * 6):
        for hits in retriever.retrieve(TITLES, k=7, filters=filters):
            assert {"new"} < {hit.product_id for hit in hits} and (len(hits) == 7) == (filters is None)
            for hit in hits:
                features = [hit.dense, np.sqrt(np.exp(hit.logp)), hit.lexical]
                np.testing.assert_allclose(retriever.expansion.features(hit), features, rtol=1e-6, atol=1e-6)
                assert hit.score == pytest.approx(np.dot([1.0, 0.3, 0.05], features), abs=1e-6)


def test_it_tells_how_many_beams_hold_an_id(served):
    retriever, told = Retriever.open(served, encode_query=encode), []
    retriever.tell = lambda alive_B: told.append(alive_B.tolist())
    retriever.retrieve(["oak table", "hinge"], k=2, filters=[None, {"products": ["p0"]}])
    assert told == [[1.0, 0.25]], "four codes of the first level, and the one of p0"


def test_answers_do_not_depend_on_the_batch_or_on_k(served):
    retriever = Retriever.open(served, encode_query=encode)
    together = retriever.retrieve(TITLES, k=6)
    retriever.batch = 1
    assert names_of(retriever.retrieve(TITLES, k=6)) == names_of(together)
    assert names_of(retriever.retrieve(TITLES, k=2)) == [names[:2] for names in names_of(together)]


def test_each_query_has_its_own_filter(served, tmp_path):
    plain = copy(served, tmp_path, expansion=None, stop_level=None, beam_width=6)
    filters = [
        None,
        {"column": "material", "in": ["oak"]},
        {"all": [{"column": "price", "from": 10}, {"not": {"products": ["p2"]}}]},
        {"column": "material", "in": ["gold"]},
    ]
    for retriever in (Retriever.open(served, encode_query=encode), Retriever.open(plain)):
        names = names_of(retriever.retrieve(["oak table"] * 4, k=6, filters=filters))
        assert sorted(names[0]) == [f"p{i}" for i in range(6)]
        assert sorted(names[1]) == ["p3", "p4"] and sorted(names[2]) == ["p0", "p1", "p5"] and names[3] == []
        assert names == [names_of(retriever.retrieve(["oak table"], k=6, filters=[one]))[0] for one in filters]
    with pytest.raises(QueryError, match=r'filter at \$.column: unknown column "colour"; there are .*material.*price'):
        retriever.retrieve(["oak"], k=1, filters=[{"column": "colour", "in": []}])
    with pytest.raises(QueryError, match="2 filters for 1 queries"):
        retriever.retrieve(["oak"], k=1, filters=[None, None])


def test_an_answer_of_fewer_products_says_why(served, tmp_path):
    whole = Retriever.open(copy(served, tmp_path, stop_level=None, beam_width=2), encode_query=encode)
    oak = {"column": "material", "in": ["oak"]}
    for expression, k, found, why in [
        (None, 2, 2, None), (None, 6, 2, "search"), (oak, 2, 2, None), (oak, 3, 2, "catalogue"),
        ({"column": "material", "in": ["gold"]}, 3, 0, "catalogue"),
    ]:  # fmt: skip
        hits = whole.retrieve(["oak table"], k=k, filters=[expression])[0]
        assert (len(hits), whole.why_fewer(len(hits), k=k, expression=expression)) == (found, why)
    clusters = Retriever.open(served, encode_query=encode)
    clusters.insert([Newcomer("new", "oak hose")], [[2, 0]], {"material": ["oak"], "price": [5.0]})
    assert clusters.why_fewer(3, k=4, expression=oak) == "catalogue"
    assert clusters.why_fewer(6, k=8) == "search" and clusters.why_fewer(7, k=8) == "catalogue"
    clusters.live.withdraw(["new"])
    assert clusters.why_fewer(6, k=8) == clusters.why_fewer(2, k=4, expression=oak) == "catalogue"


def test_a_release_without_columns_filters_by_product(folder):
    retriever = Retriever.open(folder)
    assert names_of(retriever.retrieve(["oak"], k=6, filters=[{"products": ["p4", "nobody"]}])) == [["p4"]]
    with pytest.raises(QueryError, match='unknown column "price"'):
        retriever.retrieve(["oak"], k=1, filters=[{"column": "price", "to": 3}])


def test_a_new_product_is_found_by_its_vector_and_a_withdrawn_one_is_not(served):
    retriever = Retriever.open(served, encode_query=encode)
    newcomer = Newcomer("new", "copper hose 10 ft", value=9.0)
    retriever.insert([newcomer], [[2, 0]], {"material": ["copper"], "price": [5.0]})
    hits = retriever.retrieve(["copper hose 10 ft"], k=7)[0]
    assert hits[0].product_id == "new" and hits[0].docid_text == "<a_2><b_0>" and hits[0].title == "copper hose 10 ft"
    assert hits[0].dense == pytest.approx(1, abs=2e-3) and hits[0].lexical > 0 and len(hits) == 7
    cheap = [{"column": "price", "to": 8}]
    assert names_of(retriever.retrieve(["copper hose 10 ft"], k=7, filters=cheap))[0][0] == "new"
    retriever.live.withdraw(["new", "p2"])
    assert not {"new", "p2"} & set(names_of(retriever.retrieve(["copper pipe 10 ft"], k=7))[0])
    retriever.live.restore(["p2"])
    assert names_of(retriever.retrieve(["copper pipe 10 ft"], k=7))[0][0] == "p2"


class Turned:
    """An adapter that turns queries and products each in its own way."""

    def queries(self, vector_ND):
        return np.roll(vector_ND, 1, axis=1)

    def products(self, vector_ND):
        return np.ascontiguousarray(vector_ND[:, ::-1])


def test_queries_and_new_products_go_through_the_adapter_each_through_its_own(served):
    retriever = Retriever.open(served, encode_query=encode, adapter=Turned())
    title_of = dict(zip([f"p{i}" for i in range(6)], TITLES))
    retriever.insert([Newcomer("new", "copper hose 10 ft")], [[2, 0]], {"material": ["copper"], "price": [5.0]})
    for hit in retriever.retrieve(["copper hose 10 ft"], k=7)[0]:
        product_1D = encode([title_of[hit.product_id]]) if hit.product_id != "new" else encode([hit.title])[:, ::-1]
        expected = float(np.roll(encode(["copper hose 10 ft"]), 1, axis=1)[0] @ product_1D[0])
        assert hit.dense == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("logp_weight", [1.0, 0.0])
def test_a_search_that_looks_ahead_ranks_by_s_or_rescores(served, parts, tmp_path, monkeypatch, logp_weight):
    weights = {"logp_weight": logp_weight, "vector_weight": 100.0, "lexical_weight": 0.1}
    plain = copy(served, tmp_path, search="lookahead", lookahead=weights, expansion=None, stop_level=None, beam_width=6)
    trie, vectors = Trie.open(plain / "trie"), VectorStore.open(plain / "vectors")
    with pytest.raises(InputError, match="looking ahead needs node vectors, which the release lacks"):
        Retriever.open(plain, encode_query=encode)
    NodeVectors.write(plain / "node_vectors", trie, vectors, depth=2)
    retriever = Retriever.open(plain, encode_query=encode)
    if not logp_weight:
        monkeypatch.setattr(retriever, "_encoded", lambda texts: pytest.fail("asked the generator"))
    answers = retriever.retrieve(TITLES, k=3)
    assert [hits[0].title for hits in answers] == TITLES and all(len(hits) == 3 for hits in answers)
    for hits in answers:
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all((hit.logp is None) == (not logp_weight) and hit.score != hit.logp for hit in hits)
    retriever.insert([Newcomer("new", "copper hose 10 ft")], [[2, 0]])
    assert retriever.retrieve(["copper hose 10 ft"], k=2)[0][0].product_id == "new"
    retriever.live.withdraw(["new"])
    assert names_of(retriever.retrieve(TITLES, k=3)) == names_of(answers)
    under = [{"column": "material", "in": ["oak"]}] * 2
    assert names_of(retriever.retrieve(["oak table", "garden hose"], k=6, filters=under))[0] == ["p4", "p3"]
    (again := tmp_path / "again").mkdir()
    rescored = Retriever.open(copy(plain, again, expansion={"a": 0.0}, stop_level=1, beam_width=2), encode_query=encode)
    (hits,) = rescored.retrieve(["oak table"], k=6)
    assert [hit.title for hit in hits][:2] == ["oak table", "oak door"] and hits[0].dense > hits[1].dense
    assert (hits[0].logp is None) == (not logp_weight)


@pytest.mark.parametrize("looks", [True, False])
def test_products_inserted_live_are_found_by_their_titles(served, tmp_path, monkeypatch, looks):
    """Below first codes that the generator gives to other words; were its word taken for what it never met, they were not."""
    weights = {"logp_weight": 0.1, "vector_weight": 1.0, "lexical_weight": 0.1}
    plain = copy(served, tmp_path, search="lookahead", lookahead=weights, expansion=None, stop_level=None, beam_width=6)
    NodeVectors.write(plain / "node_vectors", Trie.open(plain / "trie"), VectorStore.open(plain / "vectors"), depth=2)
    if not looks:
        monkeypatch.setattr(LiveTensors, "fair", lambda self, level, place, children, step_BMC: step_BMC)
    retriever = Retriever.open(plain, encode_query=encode)
    titles = ["oak hinge", "brass table", "copper door", "steel hose", "garden pipe"]
    codes = [(1, 3), (0, 3), (2, 0), (3, 0), (2, 1)]
    retriever.put([Newcomer(f"n{number}", title) for number, title in enumerate(titles)], codes)
    first = [names[:1] == [f"n{number}"] for number, names in enumerate(names_of(retriever.retrieve(titles, k=12)))]
    assert first == [looks] * 5
    assert names_of(retriever.retrieve(TITLES, k=1)) == [[f"p{number}"] for number in range(6)]


def test_a_state_in_which_every_newcomer_is_withdrawn_is_searched(served, tmp_path):
    ahead = {"search": "lookahead", "lookahead": {"logp_weight": 0.1}, "expansion": None, "stop_level": None}
    folder = copy(served, tmp_path, **ahead)
    NodeVectors.write(
        folder / "node_vectors", Trie.open(folder / "trie"), VectorStore.open(folder / "vectors"), depth=2
    )
    first, restored = (Retriever.open(folder, encode_query=encode) for _ in range(2))
    first.put([Newcomer("n", "oak hinge")], [(1, 3)])
    first.withdraw(["n"])
    restored.restore_state(first.live_state())
    assert names_of(restored.retrieve(TITLES, k=6)) == names_of(first.retrieve(TITLES, k=6))


def test_a_live_beam_without_rescoring_finds_new_products_too(folder):
    retriever = Retriever.open(folder)
    retriever.insert([Newcomer("new", "copper hose")], [[2, 2]])
    hits = retriever.retrieve(["copper pipe 10 ft"], k=7)[0]
    assert {"new", "p2"} < {hit.product_id for hit in hits} and len(hits) == 7
    assert all(hit.score == hit.logp and hit.dense is None for hit in hits)
    retriever.live.withdraw(["p2"])
    assert "p2" not in names_of(retriever.retrieve(["copper pipe 10 ft"], k=7))[0]


def test_an_insert_that_does_not_fit_changes_nothing(served):
    retriever = Retriever.open(served, encode_query=encode)
    before = names_of(retriever.retrieve(TITLES, k=6))
    for newcomer, codes, columns, message in (
        (Newcomer("p0", "x"), [[0, 3]], None, "product 'p0' is live already"),
        (Newcomer("new", "x"), [[2, 3]], None, "would share the ID <a_2><b_3>"),
        (Newcomer("new", "x"), [[2, 9]], None, "code 9 at level 1 is outside"),
        (Newcomer("new", "x"), [[0, 3]], {"colour": ["red"]}, "unknown columns"),
        (Newcomer("new", "x", np.zeros(3)), [[0, 3]], None, "the vector of product 'new' must be 12 finite numbers"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.insert([newcomer], codes, columns)
    assert retriever.products.newcomers == () and names_of(retriever.retrieve(TITLES, k=6)) == before


def test_int8_and_other_numbers_win_over_the_release(served, folder):
    quick = Retriever.open(folder, weights="int8", normalize="vocabulary")
    assert quick.decoder.weights == "int8" and quick.normalize == "vocabulary"
    assert [hits[0].title for hits in quick.retrieve(TITLES, k=1)] == TITLES
    half = Retriever.open(folder, dtype="bfloat16")
    assert [hits[0].title for hits in half.retrieve(TITLES, k=1)] == TITLES
    with pytest.raises(InputError, match="int8 weights are for CPUs and float32, found device cpu and dtype bfloat16"):
        Retriever.open(folder, weights="int8", dtype="bfloat16")


def test_scores_that_the_generator_was_not_taught_are_refused(folder, tmp_path):
    taught = copy(folder, tmp_path, loss="trie", normalize="trie")
    assert Retriever.open(taught).normalize == "trie"
    for normalize in ("level", "vocabulary"):
        with pytest.raises(
            ReleaseError, match=f"with loss trie, which is searched with normalize trie, found {normalize}"
        ):
            Retriever.open(taught, normalize=normalize)
    with pytest.raises(
        ReleaseError, match="with loss level, which is searched with normalize level or vocabulary, found trie"
    ):
        Retriever.open(folder, normalize="trie")


def test_value_decides_where_no_vectors_do(served, tmp_path, parts):
    settings = {"dense": "none", "order": "value", "a": 0.0}
    retriever = Retriever.open(copy(served, tmp_path, expansion=settings))
    hits = retriever.retrieve(["oak"], k=6)[0]
    assert [hit.score for hit in hits] == [0.0] * 6 and hits[0].dense is None
    capped = Retriever.open(served, encode_query=encode)
    capped.expansion = type(capped.expansion)(**settings, most=2)
    assert set(names_of(capped.retrieve(["oak"], k=6))[0]) == set(parts[3][4:])


def test_a_release_that_lacks_what_it_asks_for(served, folder, tmp_path):
    with pytest.raises(InputError, match="re-scoring needs vectors and a lexical index, which the release lacks"):
        Retriever.open(copy(folder, tmp_path, expansion={"lexical_weight": 1.0}))
    (tmp_path / "retriever.json").unlink()
    (tmp_path / "retriever.json").write_text(json.dumps({"codes_per_level": [4, 4], "expansion": {"b": 1}}))
    with pytest.raises(ArtifactError, match="publish it again"):
        Retriever.open(tmp_path)
    with pytest.raises(InputError, match="there is no encoder for vectors of queries"):
        Retriever.open(served).retrieve(["oak"], k=1)
    with pytest.raises(InputError, match="stopping at level 1 of 2 finds prefixes; give expansion settings"):
        Retriever.open(copy(folder, _fresh(tmp_path), stop_level=1))
    with pytest.raises(ReleaseError, match="5 titles for 6 trie rows"):
        Products(pa.array(["p"] * 6), pa.array(["t"] * 5)).check(6)


def _fresh(tmp_path):
    (into := tmp_path / "again").mkdir()
    return into


def free_id(retriever) -> tuple[int, int]:
    taken = {tuple(docid) for docid in retriever.trie.prefixes(2, np.arange(retriever.trie.nodes(2))).tolist()}
    return next((a, b) for a in range(4) for b in range(4) if (a, b) not in taken)


def test_a_retriever_is_diagnosed_as_it_searches(served):
    retriever = Retriever.open(served, encode_query=encode)
    relevant = [{f"p{number}"} for number in range(len(TITLES))]
    found = diagnose(retriever, TITLES, relevant, widths=(1, 100))
    assert found.served == "beam 4" and list(found.mixture) == ["beam 4", "exact"]
    hits = retriever.retrieve(TITLES, k=6)
    assert found.mixture["beam 4"][:, 0].tolist() == [
        float(name.pop() in {hit.product_id for hit in row}) for name, row in zip(relevant, hits)
    ]
    ids_BT, mask_BT, memory = retriever._encoded(TITLES)
    narrow = constrained_beam_search(
        retriever.decoder, retriever.trie, ids_BT, mask_BT, beam_width=1, top_k=1, levels=1, memory=memory
    )
    row_of = retriever.live.names.rows([f"p{number}" for number in range(6)])
    inside = [start <= row < end for row, (start, end) in zip(row_of.tolist(), narrow.row_range_BK2[:, 0].tolist())]
    assert found.kept["beam 1"][:, 0].tolist() == inside
    # What was published is diagnosed, whatever came since.
    wanted = [[f"p{number}"] for number in range(len(TITLES))]
    before = diagnose(retriever, TITLES, wanted, widths=(1,)).as_json()
    retriever.insert([Newcomer("n", "steel door", None)], [free_id(retriever)])
    assert diagnose(retriever, TITLES, wanted, widths=(1,)).as_json() == before
