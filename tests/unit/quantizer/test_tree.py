"""The tree coder: codes against a walk through nested lists, who is split, reserved codes, category paths, saving.

Unusual: row invariance is tested bit for bit, on shuffled tables and odd lengths.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from catid2_ray.errors import ArtifactError, InputError, RecipeError
from catid2_ray.quantizer.coder import TreeCoder
from tests.oracles import tree as oracle

PATHS = torch.tensor([[0, 0, 0], [0, 0, 3], [0, 1, -1], [2, 4, 1], [2, 5, -1], [2, 7, 2], [5, -1, -1], [6, 9, 8]])


def rows_of(count, width=6, seed=0, duplicates=0):
    rows_ND = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    rows_ND[:duplicates] = rows_ND[0] if count else 0.0
    return rows_ND


def categories_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return PATHS[torch.randint(len(PATHS), (count,), generator=generator)].clone()


def fitted(count=900, **changes):
    settings_ = {"branch": 4, "leaf": 20, "total_rows": count, "seed": 1} | changes
    return TreeCoder.fit(rows_of(count), categories_of(count), **settings_)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 150),
    seed=st.integers(0, 10**6),
    branch=st.integers(2, 6),
    leaf=st.integers(1, 30),
    depth=st.integers(0, 3),
    duplicates=st.integers(0, 60),
)
def test_codes_equal_a_walk_through_the_tree(count, seed, branch, leaf, depth, duplicates):
    rows_ND, category_NH = rows_of(count, seed=seed, duplicates=duplicates), categories_of(count, seed)
    coder = TreeCoder.fit(
        rows_ND,
        category_NH,
        branch=branch,
        leaf=leaf,
        category_depth=depth,
        paths_CH=PATHS,
        total_rows=count,
        seed=seed,
    )
    assert coder.codes_per_level[:depth] == tuple(oracle.category_codes(depth, PATHS))
    node_N = torch.zeros(count, dtype=torch.int64)
    for column, level in enumerate(coder.levels[:depth]):
        _, node_N = level.step(node_N, category_NH[:, column])
    for row, codes_L in enumerate(coder.encode(rows_ND, category_NH).tolist()):
        assert codes_L[:depth] == oracle.category_tokens(category_NH[row], PATHS, depth)
        assert codes_L[depth:] == oracle.branch_tokens(coder.levels[depth:], rows_ND[row].numpy(), int(node_N[row]))
    paths = {tuple(codes_L[:depth]) for codes_L in coder.encode(rows_ND, category_NH).tolist()}
    assert len(paths) == len(torch.unique(node_N)), "a node for each category path"


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 400),
    seed=st.integers(0, 10**6),
    branch=st.integers(2, 8),
    leaf=st.integers(1, 40),
    factor=st.integers(1, 5),
    duplicates=st.integers(0, 80),
)
def test_nodes_are_split_while_too_many_products_are_expected(count, seed, branch, leaf, factor, duplicates):
    rows_ND = rows_of(count, seed=seed, duplicates=duplicates)
    coder = TreeCoder.fit(rows_ND, None, branch=branch, leaf=leaf, total_rows=count * factor, seed=seed, max_depth=6)
    codes_NL = coder.encode(rows_ND, None)
    leaves = {}
    for row, codes_L in enumerate(codes_NL.tolist()):
        leaves.setdefault(tuple(codes_L), []).append(row)
    for codes_L, members in leaves.items():
        equal = bool((rows_ND[members] == rows_ND[members[0]]).all())
        assert len(members) * factor <= leaf or equal or len(codes_L) == 6
    state, level = torch.zeros(count, dtype=torch.int64), None
    for level in coder.levels:
        for node, size in Counter(state[state >= 0].tolist()).items():
            assert size * factor > leaf or level.count_G[node] == 0
            assert int(level.count_G[node]) <= branch and int(level.count_G[node]) != 1
        _, state = level.step(state, rows_ND)


def test_rows_get_the_same_code_in_any_company():
    coder, rows_ND, category_NH = fitted(category_depth=2), rows_of(2500, seed=4), categories_of(2500, 4)
    codes_NL = coder.encode(rows_ND, category_NH)
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coder.encode(rows_ND[order], category_NH[order]), codes_NL[order])
    for start, stop in ((0, 1), (3, 1030), (1024, 2499)):
        assert torch.equal(coder.encode(rows_ND[start:stop], category_NH[start:stop]), codes_NL[start:stop])
    assert coder.encode(rows_ND[:0], category_NH[:0]).shape == (0, len(coder.codes_per_level))


def test_the_reserved_code_stands_below_the_end_of_a_path_only():
    rows_ND = torch.cat((rows_of(200) * 0.1, rows_of(12, seed=1) * 0.1 + 50.0))
    coder = TreeCoder.fit(rows_ND, None, branch=2, leaf=20, total_rows=212, seed=0)
    codes_NL, reserved = coder.encode(rows_ND, None), [k - 1 for k in coder.codes_per_level]
    assert coder.codes_per_level[0] == 2, "every path has a first token, so no code is reserved"
    assert set(coder.codes_per_level[1:]) == {3}
    assert len(torch.unique(codes_NL[200:], dim=0)) == 1
    assert codes_NL[200, 1:].tolist() == reserved[1:]
    ended_NL = codes_NL[:, 1:] == torch.tensor(reserved[1:])
    assert (ended_NL.int().diff(dim=1) >= 0).all(), "nothing follows a reserved code"


def test_well_separated_clusters_are_found():
    centre_KD = torch.eye(6) * 20
    rows_ND = centre_KD.repeat_interleave(30, 0) + 0.1 * rows_of(180)
    codes_NL = TreeCoder.fit(rows_ND, None, branch=6, leaf=30, total_rows=180, seed=0).encode(rows_ND, None)
    assert codes_NL.shape == (180, 1)
    assert [len(part.unique()) for part in codes_NL[:, 0].split(30)] == [1] * 6
    assert len(codes_NL.unique()) == 6


def test_ties_go_to_the_lowest_code():
    coder = TreeCoder.fit(torch.tensor([[-1.0], [1.0]]), None, branch=2, leaf=1, total_rows=2, seed=0)
    assert coder.encode(torch.tensor([[0.0], [-1.0], [1.0]]), None)[0].tolist() == [0]


def test_unknown_and_missing_categories_take_the_reserved_code_and_still_branch():
    coder = fitted(category_depth=2, paths_CH=PATHS)
    assert coder.codes_per_level[:2] == (5, 4)
    category_NH = torch.tensor([[2, 7, 2], [2, 0, -1], [77, 4, 1], [-1, -1, -1], [-1, 4, 1], [5, -1, -1]])
    codes_NL = coder.encode(rows_of(6, seed=8), category_NH)
    assert codes_NL[:, :2].tolist() == [[1, 2], [1, 3], [4, 3], [4, 3], [4, 3], [2, 3]]
    reserved = torch.tensor(coder.codes_per_level[2:]) - 1
    assert (codes_NL[1:5, 2:] == reserved).all(), "no sample row was seen there, so the path ends"
    assert (codes_NL[5, 2:] != reserved).any(), "the rows of a path that ends early are split as any others"


@pytest.mark.parametrize("paths_CH", [None, PATHS[:0]])
def test_a_catalogue_without_categories_has_one_reserved_code_per_category_level(paths_CH):
    rows_ND, none_NH = rows_of(60), torch.full((60, 2), -1)
    settings_ = {"branch": 3, "leaf": 10, "category_depth": 2, "total_rows": 60, "seed": 0}
    coder = TreeCoder.fit(rows_ND, none_NH, paths_CH=paths_CH, **settings_)
    assert coder.codes_per_level[:3] == (1, 1, 4)
    assert coder.encode(rows_ND, PATHS[[0] * 60])[:, :2].max() == 0
    assert len(torch.unique(coder.encode(rows_ND, none_NH), dim=0)) >= 6


def test_equal_rows_end_the_tree_and_empty_trees_have_no_levels(tmp_path):
    for coder in (
        TreeCoder.fit(torch.ones(500, 3), None, branch=10, leaf=5, total_rows=500, seed=0),
        TreeCoder.fit(rows_of(50, 3), None, branch=10, leaf=50, total_rows=50, seed=0),
        TreeCoder.empty(),
    ):
        assert coder.codes_per_level == ()
        coder.save(tmp_path)
        assert TreeCoder.load(tmp_path).encode(rows_of(7, 3), None).shape == (7, 0)


@pytest.mark.parametrize("changes", [{}, {"category_depth": 3, "paths_CH": PATHS}, {"category_depth": 2, "leaf": 900}])
def test_saved_and_loaded_trees_give_equal_codes(tmp_path, changes):
    coder, rows_ND, category_NH = fitted(**changes), rows_of(300, seed=2), categories_of(300, 2)
    coder.save(tmp_path / "new" / "folder")
    loaded = TreeCoder.load(tmp_path / "new" / "folder")
    assert loaded.codes_per_level == coder.codes_per_level
    assert loaded.category_depth == coder.category_depth
    assert torch.equal(loaded.encode(rows_ND, category_NH), coder.encode(rows_ND, category_NH))
    assert json.loads((tmp_path / "new" / "folder" / "quantizer.json").read_text())["class"] == "tree"


def test_equal_fits_and_another_seed():
    first, second, other = fitted(), fitted(), fitted(seed=2)
    assert all(torch.equal(a.centroid_CD, b.centroid_CD) for a, b in zip(first.levels, second.levels, strict=True))
    assert not torch.equal(first.levels[0].centroid_CD, other.levels[0].centroid_CD)


def change_tensor(name, change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = change(state[name])
        save_file(state, folder / "model.safetensors")

    return damage


def change_setting(**changes):
    def damage(folder):
        path = folder / "quantizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "quantizer.json").write_text("{"), "are no tree"),
        (lambda folder: (folder / "quantizer.json").write_text("[]"), "are no tree"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20), "are no tree"),
        (change_setting(**{"class": "residual"}), "its class is 'residual', expected 'tree'"),
        (change_setting(width=7), "level 1 of 5 codes does not fit"),
        (change_setting(codes_per_level=[5, 9, 5]), "level 1 of 9 codes does not fit"),
        (change_setting(category_depth=2), "KeyError"),
        (change_tensor("0.category_E", lambda category_E: category_E.flip(0).contiguous()), "level 0 of 5 codes"),
        (change_tensor("0.parent_E", lambda parent_E: parent_E + 3), "level 0 of 5 codes does not fit"),
        (change_tensor("1.count_G", lambda count_G: count_G[:-1].contiguous()), "level 1 of 5 codes does not fit"),
        (change_tensor("1.centroid_CD", lambda rows: rows[:-1].contiguous()), "level 1 of 5 codes does not fit"),
        (change_tensor("1.centroid_CD", lambda rows: rows / 0), "level 1 of 5 codes does not fit"),
    ],
)
def test_damaged_trees_are_refused(tmp_path, damage, message):
    fitted(category_depth=1, paths_CH=PATHS).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        TreeCoder.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_settings_and_tables_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="found branch 1, leaf 20, category_depth 0, max_depth 12"):
        fitted(branch=1)
    with pytest.raises(RecipeError, match="0 ≤ category_depth ≤ max_depth"):
        fitted(category_depth=3, max_depth=2)
    with pytest.raises(InputError, match=r"a sample has 1 to total_rows = 10 rows, found 900"):
        fitted(total_rows=10)
    with pytest.raises(InputError, match="a sample has 1 to total_rows = 9 rows, found 0"):
        TreeCoder.fit(rows_of(0), None, branch=2, leaf=2, total_rows=9, seed=0)
    with pytest.raises(InputError, match=r"paths_CH must have at least category_depth = 3 columns, found \(8, 2\)"):
        fitted(category_depth=3, paths_CH=PATHS[:, :2])
    coder = fitted(category_depth=2)
    with pytest.raises(InputError, match=r"embeddings must be rows × 6, found \(5, 4\)"):
        coder.encode(rows_of(5, 4), categories_of(5))
    with pytest.raises(InputError, match=r"need categories of shape \(5, ≥ 2\), found \(4, 3\)"):
        coder.encode(rows_of(5), categories_of(4))
    with pytest.raises(InputError, match=r"≥ 2\), found None"):
        coder.encode(rows_of(5), None)
    broken_ND = rows_of(5)
    broken_ND[3, 2] = np.nan
    with pytest.raises(InputError, match="row 3 of the embeddings is not finite"):
        coder.encode(broken_ND, categories_of(5))
