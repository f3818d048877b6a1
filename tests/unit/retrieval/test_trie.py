"""The trie against a dictionary that walks every ID, on disk as in memory.

Small spaces on purpose: equal prefixes, full nodes and single-code levels all occur.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.retrieval.trie import Trie
from tests.oracles.trie import DictTrie


@st.composite
def id_tables(draw):
    codes_per_level = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    one_id = st.tuples(*(st.integers(0, k - 1) for k in codes_per_level))
    shared = draw(st.booleans())
    return codes_per_level, draw(st.lists(one_id, min_size=1, max_size=25, unique=not shared)), shared


@settings(max_examples=150, deadline=None)
@given(table=id_tables())
def test_every_node_range_and_child_is_the_oracles(table):
    codes_per_level, ids, shared = table
    trie, oracle = Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=shared), DictTrie(ids)
    trie.check()
    assert trie.order_N.tolist() == oracle.order
    assert (trie.rows, trie.levels, len(trie.token[0])) == (len(ids), len(codes_per_level), 0)
    for level in range(trie.levels + 1):
        prefixes = oracle.prefixes(level)
        assert trie.nodes(level) == len(prefixes)
        assert [tuple(p) for p in trie.prefixes(level, np.arange(trie.nodes(level))).tolist()] == prefixes
        ranges = [(int(a), int(b)) for a, b in zip(trie.row_start[level], trie.row_start[level][1:])]
        assert ranges == [oracle.item_range(p) for p in prefixes] == [trie.item_range(p) for p in prefixes]
    for level, k in enumerate(codes_per_level):
        asked = np.arange(trie.nodes(level))[::-1]
        found = trie.children(level, asked)
        names = [tuple(p) for p in trie.prefixes(level, asked).tolist()]
        expected = [(i, code) for i, name in enumerate(names) for code in sorted(oracle.children[name])]
        assert list(zip(found.parent_index.tolist(), found.token.tolist())) == expected
        reached = [tuple(p) for p in trie.prefixes(level + 1, found.child).tolist()]
        assert reached == [(*names[i], code) for i, code in expected]
        for name in names:
            for code in range(k):
                assert trie.item_range((*name, code)) == oracle.item_range((*name, code))


def test_no_nodes_asked_no_children():
    trie = Trie.build([[0, 1], [1, 0]], codes_per_level=(2, 2))
    assert [len(part) for part in trie.children(1, [])] == [0, 0, 0]
    assert trie.children(1, [0, 0]).parent_index.tolist() == [0, 1]


def test_item_range_refuses_what_is_no_prefix():
    trie = Trie.build([[0, 1], [1, 0]], codes_per_level=(2, 2))
    for prefix in ([2], [0, -1], [0, 0, 0]):
        with pytest.raises(InputError, match="is no prefix of an ID"):
            trie.item_range(prefix)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1], [1, 0], [0, 1]], "rows 0 and 2 share the ID <a_0><b_1>"),
        (np.empty((0, 2), int), "at least one ID"),
        ([[0, 2]], "row 0: code 2 at level 1"),
        ([[0, 1, 1]], "integer array N×2"),
        ([[0.0, 1.0]], "integer array N×2"),
    ],
)
def test_build_refuses(codes, message):
    with pytest.raises(InputError, match=message):
        Trie.build(codes, codes_per_level=(2, 2))


@pytest.fixture
def saved(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 5, (60, 3)), axis=0)
    trie = Trie.build(rng.permutation(codes), codes_per_level=(5, 5, 5))
    trie.save(tmp_path / "trie")
    return trie, tmp_path / "trie"


def test_saved_and_opened_it_is_the_same_trie(saved):
    trie, folder = saved
    opened = Trie.open(folder)
    opened.check()
    assert (opened.codes_per_level, opened.shared, opened.rows) == (trie.codes_per_level, False, trie.rows)
    pairs = zip(
        (trie.order_N, *trie.child_start, *trie.token, *trie.row_start),
        (opened.order_N, *opened.child_start, *opened.token, *opened.row_start),
    )
    assert all(np.array_equal(a, b) and b.dtype == np.int64 for a, b in pairs)
    assert opened.item_range(trie.prefixes(3, [7])[0]) == (7, 8)


def test_opened_arrays_become_tensors_without_a_warning_or_a_write(saved):
    _, folder = saved
    opened = Trie.open(folder)
    before = (folder / "token_1.npy").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token = torch.from_numpy(opened.token[1])
    token += 1
    assert (folder / "token_1.npy").read_bytes() == before


def _without_header(folder):
    (folder / "trie.json").unlink()


def _broken_header(folder):
    (folder / "trie.json").write_text("{")


def _empty_header(folder):
    (folder / "trie.json").write_text("{}")


def _other_format(folder):
    header = json.loads((folder / "trie.json").read_text()) | {"format": 99}
    (folder / "trie.json").write_text(json.dumps(header))


def _other_rows(folder):
    header = json.loads((folder / "trie.json").read_text()) | {"rows": 3}
    (folder / "trie.json").write_text(json.dumps(header))


def _missing_array(folder):
    (folder / "token_2.npy").unlink()


def _cut_array(folder):
    (folder / "order.npy").write_bytes((folder / "order.npy").read_bytes()[:-8])


def _other_type(folder):
    np.save(folder / "order.npy", np.load(folder / "order.npy").astype(np.int32))


def _other_end(folder):
    array = np.load(folder / "child_start_1.npy")
    array[-1] += 1
    np.save(folder / "child_start_1.npy", array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_header, "holds no finished trie"),
        (_broken_header, "is not JSON"),
        (_empty_header, "is no trie header"),
        (_other_format, "has format 99"),
        (_other_rows, "contradicts itself"),
        (_missing_array, "token_2.npy cannot be read"),
        (_cut_array, "order.npy cannot be read"),
        (_other_type, "int64 numbers, found int32"),
        (_other_end, "expected to run from 0 to"),
    ],
)
def test_open_refuses_a_damaged_folder(saved, damage, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        Trie.open(folder)


def test_check_finds_swapped_codes(saved):
    _, folder = saved
    opened = Trie.open(folder)
    opened.token[1][:2] = opened.token[1][1::-1].copy()
    with pytest.raises(ArtifactError, match="codes of level 1 are in order"):
        opened.check()
