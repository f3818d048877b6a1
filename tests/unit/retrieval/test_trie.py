"""The trie against a dictionary that walks every ID, on disk as in memory.

Small spaces on purpose: equal prefixes, full nodes and single-code levels all occur; wide ones too, where nearly every
node has one child and ranges are kept as their exceptions.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError, ReleaseError
from catid2_ray.retrieval.arrays import Starts
from catid2_ray.retrieval.trie import Trie
from tests.oracles.trie import DictTrie, starts_of


@st.composite
def id_tables(draw):
    most = draw(st.sampled_from((4, 300)))
    codes_per_level = tuple(draw(st.lists(st.integers(1, most), min_size=1, max_size=4)))
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
        assert trie.widest[level] == max(len(oracle.children[prefix]) for prefix in oracle.prefixes(level))
        asked = np.arange(trie.nodes(level))[::-1]
        found = trie.children(level, asked)
        names = [tuple(p) for p in trie.prefixes(level, asked).tolist()]
        expected = [(i, code) for i, name in enumerate(names) for code in sorted(oracle.children[name])]
        assert list(zip(found.parent_index.tolist(), found.token.tolist())) == expected
        reached = [tuple(p) for p in trie.prefixes(level + 1, found.child).tolist()]
        assert reached == [(*names[i], code) for i, code in expected]
        for name in names:
            for code in {0, k // 2, k - 1, *oracle.children[name]}:
                assert trie.item_range((*name, code)) == oracle.item_range((*name, code))


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.sampled_from((1,) * 12 + (2, 5)), min_size=1, max_size=40))
def test_starts_are_read_as_if_written_out(sizes):
    plain = starts_of(sizes)
    starts = Starts.of(np.array(plain[:-1]), plain[-1])
    assert len(starts.array) == Starts.stored(len(sizes), plain[-1]) <= len(plain)
    assert (list(starts), len(starts), starts.widest(), starts.sound()) == (plain, len(plain), max(sizes), True)
    assert starts[1:-1].tolist() == plain[1:-1] and starts[::-2].tolist() == plain[::-2]
    assert (int(starts[0]), int(starts[-1]), starts[np.array([-1, 0])].tolist()) == (0, plain[-1], [plain[-1], 0])
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    assert starts.holding(np.arange(plain[-1])).tolist() == owner
    with pytest.raises(IndexError):
        starts[[len(plain)]]


def test_few_entries_are_looked_up_without_reading_the_exceptions():
    sizes = np.random.default_rng(0).choice([1] * 29 + [2, 3], 6000)
    starts = Starts.of(np.cumsum(sizes) - sizes, int(sizes.sum()))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    assert len(starts.extra) > 200
    for entries in (*np.arange(0, len(owner), 3)[:, None], np.array([0, len(owner) - 1]), np.empty(0, int)):
        assert starts.holding(entries).tolist() == owner[entries].tolist()


@settings(max_examples=60, deadline=None)
@given(table=id_tables())
def test_sorted_ids_give_the_same_trie_and_need_no_order(table):
    codes_per_level, ids, shared = table
    space = DocidSpace(codes_per_level)
    trie = Trie.build(np.array(sorted(ids)), codes_per_level=codes_per_level, shared=shared)
    packed = Trie.from_sorted(np.sort(space.pack(ids)), codes_per_level=codes_per_level, shared=shared)
    packed.check()
    assert trie.order is None and packed.order is None and packed.order_N.tolist() == list(range(len(ids)))
    shuffled = Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=shared)
    for one in (packed, trie):
        assert one.widest == shuffled.widest
        pairs = zip(
            (*one.child_start, *one.token, *one.row_start),
            (*shuffled.child_start, *shuffled.token, *shuffled.row_start),
        )
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_ranges_that_nearly_all_hold_one_entry_cost_little():
    space = DocidSpace((256,) * 6)
    packed = np.unique(np.random.default_rng(0).integers(0, space.capacity, 20_000))
    trie = Trie.from_sorted(packed, codes_per_level=space.codes_per_level)
    assert [token.dtype for token in trie.token] == [np.uint8] * 7
    assert all(starts.array.dtype == np.int32 for starts in (*trie.child_start, *trie.row_start))
    beside = trie.nbytes - sum(token.nbytes for token in trie.token)
    assert beside < 8 * len(packed)
    wide = Trie.build([[300, 40_000]], codes_per_level=(301, 40_001))
    assert [token.dtype for token in wide.token[1:]] == [np.int16, np.int32]


def test_no_nodes_asked_no_children():
    trie = Trie.build([[0, 1], [1, 0]], codes_per_level=(2, 2))
    assert [len(part) for part in trie.children(1, [])] == [0, 0, 0]
    assert trie.children(1, [0, 0]).parent_index.tolist() == [0, 1]


def test_item_range_refuses_what_is_no_prefix():
    trie = Trie.build([[0, 1], [1, 0]], codes_per_level=(2, 2))
    for prefix in ([2], [0, -1], [0, 0, 0]):
        with pytest.raises(InputError, match="is no prefix of an ID"):
            trie.item_range(prefix)


def test_a_saved_trie_tells_of_which_ids_it_is(tmp_path):
    trie = Trie.build([[0, 1], [1, 0]], codes_per_level=(2, 2))
    trie.save(tmp_path / "none")
    trie.save(tmp_path / "named", identity="sha256:1")
    opened = Trie.open(tmp_path / "named", identity="sha256:1")
    opened.save(tmp_path / "again")
    assert Trie.open(tmp_path / "again").identity == opened.identity == "sha256:1"
    assert trie.identity is None and Trie.open(tmp_path / "none").identity is None
    for name, says in (("named", "'sha256:1'"), ("none", "None")):
        with pytest.raises(ReleaseError, match=f"a trie of other IDs: it says {says}, expected 'sha256:2'"):
            Trie.open(tmp_path / name, identity="sha256:2")
    header = json.loads((tmp_path / "none" / "trie.json").read_text())
    del header["identity"]
    (tmp_path / "none" / "trie.json").write_text(json.dumps(header))
    assert Trie.open(tmp_path / "none").identity is None
    (tmp_path / "none" / "trie.json").write_text(json.dumps(header | {"identity": 7}))
    with pytest.raises(ArtifactError, match="contradicts itself"):
        Trie.open(tmp_path / "none")


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


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ([0, 2, 1], "must ascend, found 1 at row 2 after 2; sort them, or use Trie.build"),
        ([0, 4], "run from 0 to 4, but codes_per_level .* has 0 to 3"),
        ([-1, 0], "run from -1 to 0"),
        ([1, 3, 3], "rows 1 and 2 share the ID <a_1><b_1>"),
        ([], "at least one ID"),
        ([[1, 2]], "one row of int64"),
        ([0.0], "one row of int64, found float64"),
    ],
)
def test_from_sorted_refuses(packed, message):
    packed = np.array(packed, None if packed else np.int64)
    with pytest.raises(InputError, match=message):
        Trie.from_sorted(packed, codes_per_level=(2, 2))


@pytest.fixture
def saved(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 5, (60, 3)), axis=0)
    trie = Trie.build(rng.permutation(codes), codes_per_level=(5, 5, 5))
    trie.save(tmp_path / "trie")
    return trie, tmp_path / "trie"


@settings(max_examples=40, deadline=None)
@given(table=id_tables())
def test_saved_and_opened_it_is_the_same_trie(tmp_path_factory, table):
    codes_per_level, ids, shared = table
    trie, folder = Trie.build(ids, codes_per_level=codes_per_level, shared=shared), tmp_path_factory.mktemp("trie")
    trie.save(folder)
    opened = Trie.open(folder)
    opened.check()
    assert (opened.codes_per_level, opened.shared, opened.rows) == (trie.codes_per_level, shared, trie.rows)
    assert (opened.widest, opened.nbytes, opened.order is None) == (trie.widest, trie.nbytes, trie.order is None)
    assert sum(path.stat().st_size - 128 for path in folder.glob("*.npy")) == trie.nbytes
    pairs = zip(
        (trie.order_N, *trie.child_start, *trie.token, *trie.row_start),
        (opened.order_N, *opened.child_start, *opened.token, *opened.row_start),
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert opened.item_range(trie.prefixes(trie.levels, [0])[0]) == trie.item_range(ids[trie.order_N[0]])


def test_a_smaller_trie_saved_over_a_larger_one_is_opened(saved):
    _, folder = saved
    Trie.build([[0, 0, 0], [1, 1, 1]], codes_per_level=(5, 5, 5)).save(folder)
    opened = Trie.open(folder)
    opened.check()
    assert opened.rows == 2 and opened.order_N.tolist() == [0, 1]


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
    np.save(folder / "order.npy", np.load(folder / "order.npy").astype(np.int64))


def _other_widest(folder):
    header = json.loads((folder / "trie.json").read_text()) | {"widest": [6, 1, 1]}
    (folder / "trie.json").write_text(json.dumps(header))


def _code_outside(folder):
    array = np.load(folder / "token_2.npy")
    array[-1] = 5
    np.save(folder / "token_2.npy", array)


def _other_end(folder):
    array = np.load(folder / "child_start_1.npy")
    array[-1] += 1
    np.save(folder / "child_start_1.npy", array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_header, "holds no finished trie"),
        (_broken_header, "is not JSON"),
        (_empty_header, "is no header of this kind: trie"),
        (_other_format, "has format 99"),
        (_other_rows, "contradicts itself"),
        (_missing_array, "token_2.npy cannot be read"),
        (_cut_array, "order.npy cannot be read"),
        (_other_type, "int32 numbers, found int64"),
        (_other_widest, "contradicts itself"),
        (_code_outside, "expected numbers from 0 to 4"),
        (_other_end, "expected to run from 0 to"),
    ],
)
def test_open_refuses_a_damaged_folder(saved, damage, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        Trie.open(folder)


def _swap_codes(trie):
    trie.token[1][:2] = trie.token[1][1::-1].copy()


def _move_start(trie):
    trie.child_start[1].whole[1] += 1


def _double_order(trie):
    trie.order[0] = trie.order[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_swap_codes, "codes of level 1 are in order"),
        (_move_start, "rows of level 0 are those of its children|codes of level 2 are in order"),
        (_double_order, "order is a permutation"),
    ],
)
def test_check_finds_what_open_does_not_read(saved, damage, message):
    _, folder = saved
    opened = Trie.open(folder)
    damage(opened)
    with pytest.raises(ArtifactError, match=message):
        opened.check()


def test_check_finds_exceptions_out_of_order(tmp_path):
    ids = [[0, 0], [0, 1], *([i, 0] for i in range(1, 20)), [20, 0], [20, 1]]
    Trie.build(ids, codes_per_level=(30, 2)).save(tmp_path)
    opened = Trie.open(tmp_path)
    assert opened.child_start[1].extra.tolist() == [0, 20]
    opened.child_start[1].extra[:] = [20, 0]
    with pytest.raises(ArtifactError, match="child_start of level 1 ascends"):
        opened.check()


@pytest.mark.parametrize("space, count", [(DocidSpace((7, 300, 5)), 900), (DocidSpace((2, 2)), 3)])
def test_nodes_of_ids_are_those_of_a_dictionary(space, count):
    rng = np.random.default_rng(3)
    packed = np.sort(rng.choice(space.capacity, count, replace=False))
    tree = Trie.from_sorted(packed, codes_per_level=space.codes_per_level)
    every = space.unpack(np.arange(space.capacity))
    node_ML = tree.nodes_of(every)
    for level in range(1, space.levels + 1):
        prefixes = sorted({tuple(docid) for docid in space.unpack(packed)[:, :level].tolist()})
        number = {prefix: place for place, prefix in enumerate(prefixes)}
        expected = [number.get(tuple(docid), -1) for docid in every[:, :level].tolist()]
        assert node_ML[:, level - 1].tolist() == expected
    assert tree.nodes_of(np.full((1, space.levels), -1)).tolist() == [[-1] * space.levels]
