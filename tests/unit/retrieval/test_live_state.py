"""The net state of changes: what it restores, and what goes on without rows that no name means, answers as before."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catid2_ray.errors import CapacityError, InputError
from catid2_ray.retrieval import live as live_module
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.unit.retrieval.test_node_vectors import unit_vectors
from tests.unit.retrieval.test_served import copy, encode, served  # noqa: F401

NAMES = [f"p{number}" for number in range(8)]
WORDS = ["oak", "door", "steel", "hinge"]
EXPRESSIONS = [
    {"column": "price", "from": 2}, {"not": {"column": "market", "has": ["de"]}}, {"column": "brand", "in": ["x", "new"]},
    {"products": NAMES[::2]},
]  # fmt: skip


def release():
    """What a live trie of five products is made of."""
    ids_NL = np.array([[0, 0], [0, 1], [1, 1], [2, 0], [2, 2]])
    trie, names = Trie.build(ids_NL, codes_per_level=(3, 4)), pa.array(NAMES[:5])
    index = FilterIndex(
        {"product_id": names, "price": pa.array([1.0, 2.0, None, 4.0, 5.0]), "brand": pa.array(list("xyxy") + [None]),
         "market": pa.array([["de"], None, ["at", "de"], [], ["fr"]])}
    )  # fmt: skip
    words = LexicalIndex(
        np.arange(6), np.array([0, 1, 2, 3, 0], np.int32), np.ones(5, np.float32), pa.array(sorted(WORDS)),
        np.ones(4, np.float32), 2.0,
    )  # fmt: skip
    store = VectorStore(unit_vectors(5, 3, 0).astype(np.float16), True)
    products = Products(names, pa.array(["t"] * 5), np.arange(5, dtype=np.float32), store, words)
    return trie, {"product_ids": names, "index": index, "products": products}


CHANGE = st.tuples(
    st.sampled_from(["put", "put", "insert", "withdraw", "restore", "columns", "values"]), st.integers(0, 7), st.integers(0, 11),
    st.integers(0, 1000),
)  # fmt: skip


def make(live, what, number, code, seed):
    """One change; whether it was accepted."""
    random, name = np.random.default_rng(seed), NAMES[number]
    newcomer = Newcomer(name, " ".join(random.choice(WORDS, 2)), random.normal(size=3).astype(np.float32), float(seed))
    columns = {"price": [float(seed % 7)], "market": [[["de"], ["at"], None][seed % 3]]}
    try:
        if what in ("put", "insert"):
            live.put([newcomer], [(code // 4, code % 4)], columns, only_new=what == "insert")
        elif what == "columns":
            live.put([], [], changed={name: {"price": None if seed % 5 == 0 else seed % 7, "brand": "new"}})
        elif what == "values":
            live.put([], [], values={name: None if seed % 5 == 0 else seed})
        else:
            getattr(live, what)([name])
    except (InputError, CapacityError):
        return False
    return True


def shown(live, trie, nodes):
    """All that a search could tell of each product, by name."""
    view = live.view
    rows = np.flatnonzero(view.is_live(np.arange(view.rows)))
    products, names = view.products, [view.products.name(int(row)) for row in rows]
    lexical = products.all_lexical_scores(["oak door", "hinge"])[:, rows]
    np.testing.assert_array_equal(lexical, products.lexical_scores(["oak door", "hinge"], np.stack([rows, rows])))
    parts = [codes_of(view, rows).tolist(), products.vectors.unit(rows).numpy().tolist(), lexical.T.tolist()]
    parts += [products.values.of(rows).tolist(), [products.title(int(row)) for row in rows]]
    parts += [view.compile(expression).allows(rows).tolist() for expression in EXPRESSIONS]
    moved = {}
    for depth in (1, 2):
        vector_nD, of_base = nodes.means[depth - 1].copy(), trie.prefixes(depth, np.arange(trie.nodes(depth))).tolist()
        if view.nodes.depths:
            found = view.nodes.depths[depth - 1]
            vector_nD[found.changed_X] = found.moved_SD[found.slot_X]
        moved |= dict(zip(map(tuple, of_base), vector_nD.tolist()))
        if view.inserted is not None:
            first_n = view.inserted.arrays.row_start[depth][:-1]
            codes_nL = live.space.unpack(view.inserted.packed_D[first_n])[:, :depth].tolist()
            vector_nD = found.moved_SD[found.inserted_slot_n].tolist()
            moved |= {tuple(codes): one for codes, one in zip(codes_nL, vector_nD) if any(one)}
    return {name: one for name, *one in zip(names, *parts)}, moved


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(CHANGE, max_size=25), later=st.lists(CHANGE, max_size=6), spare=st.sampled_from([0, 2]))
@example(changes=[("put", 7, 6, 0), ("withdraw", 7, 0, 0)], later=[], spare=0)  # nothing live has come or gone
def test_a_state_restored_and_rows_left_out_answer_as_before(changes, later, spare, tmp_path_factory):
    trie, options = release()
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, options["products"].base_vectors, depth=2)
    plain, compact, restored = (LiveTrie(trie, **options, nodes=nodes, most=6) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_module, "_SPARE", spare)
        for change in changes:
            patch.setattr(live_module, "_SPARE", 1000)
            accepted = make(plain, *change)
            patch.setattr(live_module, "_SPARE", spare)
            assert make(compact, *change) == accepted
        restored.restore_state(plain.state())
        assert len(compact.inserted) <= 2 * compact._counted + spare
        assert len(restored.inserted) == compact._counted == restored._counted == plain._counted
        if not any(plain.view.is_live(np.arange(plain.view.rows))):
            return
        assert shown(compact, trie, nodes) == shown(restored, trie, nodes) == shown(plain, trie, nodes)
        assert {name: table.to_pylist() for name, table in compact.state().items()} == {
            name: table.to_pylist() for name, table in restored.state().items()
        }
        for change in later:
            accepted = make(plain, *change)
            assert make(compact, *change) == make(restored, *change) == accepted
        assert shown(compact, trie, nodes) == shown(restored, trie, nodes) == shown(plain, trie, nodes)


def test_a_state_goes_through_files_and_is_of_one_release(served, tmp_path):  # noqa: F811
    retriever = Retriever.open(served, encode_query=encode)
    retriever.put([Newcomer("p4", "copper hose"), Newcomer("n", "oak")], [(2, 0), (1, 3)], {"price": [1.0, 2.0]})
    retriever.withdraw(["n", "p1"])
    retriever.put(changed={"p3": {"price": 9.5}}, values={"p0": 7.0})
    for name, table in retriever.live_state().items():
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    state = {
        name: pa.ipc.open_file(str(tmp_path / f"{name}.arrow")).read_all()
        for name in ("newcomers", "withdrawn", "changed")
    }
    again, queries = Retriever.open(served, encode_query=encode), ["copper hose", "oak door", "oak table"]
    again.restore_state(state)
    assert again.retrieve(queries, k=7) == retriever.retrieve(queries, k=7)
    again.restore(["n"])
    assert "n" in {hit.product_id for hit in again.retrieve(["oak"], k=7)[0]}
    with pytest.raises(InputError, match="a state is restored before any change; open the release anew"):
        again.restore_state(state)
    (tmp_path / "folder").mkdir()
    other = Retriever.open(copy(served, tmp_path / "folder"), encode_query=encode)
    wrong = pa.table({"row": pa.array([0]), "product_id": ["somebody"]})
    with pytest.raises(InputError, match="names other products than the release has in its rows"):
        other.restore_state(state | {"withdrawn": wrong})
    with pytest.raises(InputError, match="names row 99 of a release of 6"):
        other.restore_state(state | {"withdrawn": pa.table({"row": pa.array([99]), "product_id": ["p0"]})})
    with pytest.raises(InputError, match="this is no state of changes to this release"):
        other.restore_state({"newcomers": state["newcomers"]})
    other.restore_state(state)
