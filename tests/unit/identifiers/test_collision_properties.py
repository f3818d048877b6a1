"""Unique IDs on thousands of small random catalogues: against brute force, in any order of rows, and region by region.

Hypothesis draws one seed and numpy builds the case. Coordinates of the brute-force cases are whole numbers, so sums are
exact and ties are real ties.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError
from catid2_ray.identifiers.collisions import SOLVERS, assign_unique
from catid2_ray.identifiers.overflow import closed_regions, taken_codes
from tests.oracles.collisions import final_homes, latent, least_cost, path, smallest_regions, squared

SEEDS = st.integers(0, 2**32 - 1)


def crowded_catalogue(seed, most_levels=3, most_codes=3, most_products=9, whole=True):
    """Products crowded into few codes: nearest ones or not, some exact copies, some IDs or whole prefixes occupied."""
    rng = np.random.default_rng(seed)
    codes_per_level = [*rng.integers(1, most_codes + 1, rng.integers(0, most_levels)), rng.integers(1, 6)]
    space = DocidSpace(tuple(codes_per_level))
    count = rng.integers(1, min(most_products, space.capacity) + 1)
    books = [rng.integers(-3, 4, (codes, 2)).astype(float) for codes in codes_per_level]
    residual = rng.integers(-2, 3, (count, 2)).astype(float)
    if not whole:
        books, residual = [book + rng.normal(size=book.shape) for book in books], residual + rng.normal(size=(count, 2))
    crowd = rng.integers(0, codes_per_level, (rng.integers(1, 4), space.levels))
    codes = crowd[rng.integers(0, len(crowd), count)]
    closest = ((residual[:, None] - books[-1]) ** 2).sum(axis=2).argmin(axis=1)
    codes[:, -1] = np.where(rng.random(count) < 0.6, closest, codes[:, -1])
    copies = rng.integers(0, count, rng.integers(0, 3))
    rows = rng.integers(0, count, len(copies))
    codes[rows], residual[rows] = codes[copies], residual[copies]
    packed_N, last = space.pack(codes), space.codes_per_level[-1]
    own = packed_N[rng.random(count) < 0.3] if rng.random() < 0.5 else packed_N[:0]
    prefix = packed_N[0] // last * last + np.arange(last) if rng.random() < 0.4 else packed_N[:0]
    wanted = np.concatenate([own, prefix, rng.permutation(space.capacity)[: rng.integers(0, 7)]])
    wanted = wanted[np.sort(np.unique(wanted, return_index=True)[1])]
    return {
        "codes": codes,
        "residual": residual,
        "books": books,
        "product_ids": np.array([f"p{number}" for number in rng.permutation(2 * count)[:count]]),
        "occupied": space.unpack(wanted[: space.capacity - count]),
    }


def resolve(case, method, rows=slice(None), occupied=None):
    return assign_unique(
        case["codes"][rows],
        case["residual"][rows],
        case["books"],
        case["product_ids"][rows],
        occupied=case["occupied"] if occupied is None else occupied,
        method=method,
    )


def packed(case):
    space = DocidSpace(tuple(len(book) for book in case["books"]))
    return space, space.pack(case["codes"]), np.sort(space.pack(case["occupied"]))


def kinds(case):
    """What is special in a case, by name."""
    space, ids, taken = packed(case)
    home, size = np.unique(space.prefix_of(ids, space.levels - 1), return_counts=True)
    free = space.codes_per_level[-1] - taken_codes(taken, home, space.codes_per_level[-1]).sum(axis=1)
    distance = ((case["residual"][:, None] - case["books"][-1]) ** 2).sum(axis=2)
    own = np.take_along_axis(distance, case["codes"][:, -1:], axis=1)[:, 0]
    found = {
        "duplicates": len(np.unique(ids)) < len(ids),
        "exact copies": len(np.unique(np.column_stack([ids, case["residual"]]), axis=0)) < len(ids),
        "occupied": len(taken) > 0,
        "own ID occupied": np.isin(ids, taken).any(),
        "prefix all occupied": (free == 0).any(),
        "overflow": (size > free).any(),
        "not the nearest code": (own > distance.min(axis=1)).any(),
        "uneven K": len(set(space.codes_per_level)) > 1,
        "one level": space.levels == 1,
    }
    return {name for name, present in found.items() if present}


def test_every_kind_of_case_is_frequent():
    counts = {}
    for seed in range(1000):
        for kind in kinds(crowded_catalogue(seed)):
            counts[kind] = counts.get(kind, 0) + 1
    assert len(counts) == 9 and min(counts.values()) >= 150, counts


@settings(max_examples=800, deadline=None)
@given(seed=SEEDS)
def test_every_prefix_reaches_the_brute_force_optimum(seed):
    case = crowded_catalogue(seed)
    homes, touched = final_homes(**case)
    latents = [latent(case["books"], codes, residual) for codes, residual in zip(case["codes"], case["residual"])]
    points, best = {}, {}
    for home, z in zip(homes, latents):
        if home in touched:
            points.setdefault(home, []).append([a - b for a, b in zip(z, path(case["books"], home))])
    for home, inside in points.items():
        best[home] = least_cost(home, inside, case["books"][-1], case["occupied"].tolist())
    for method, slack in (("sinkhorn", 1.001), ("exact", 1.0), ("greedy", np.inf)):
        found = resolve(case, method)
        ids = [tuple(row) for row in found.codes_NL.tolist()]
        assert len({*ids, *map(tuple, case["occupied"].tolist())}) == len(ids) + len(case["occupied"])
        assert [docid[:-1] for docid in ids] == homes
        spent = dict.fromkeys(best, 0.0)
        nearer = {}
        for row in np.argsort(case["product_ids"]):
            docid, old = ids[row], tuple(case["codes"][row])
            before = squared(case["residual"][row], case["books"][-1][old[-1]])
            after = squared(latents[row], path(case["books"], docid))
            assert found.cost_N[row] == after - before
            assert found.moved_N[row] == (docid != old)
            if docid[:-1] in touched:
                spent[docid[:-1]] += after
                twins = nearer.setdefault((docid[:-1], *latents[row]), [])
                twins.append((after, docid))
                assert twins == sorted(twins), "of equal products the lower product_id takes the nearer code"
            else:
                assert not found.moved_N[row]
        for home, total in spent.items():
            assert best[home] <= total + 1e-9
            assert slack == np.inf or total <= slack * best[home] + 1e-9


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_exact_copies_leave_as_if_each_had_its_own_offer(seed):
    case = crowded_catalogue(seed, most_products=20)
    rng, count = np.random.default_rng(seed), len(case["codes"])
    source = rng.integers(0, count, 4)[rng.integers(0, rng.integers(1, 5), count)]
    case["codes"], case["residual"] = case["codes"][source], case["residual"][source]
    homes, _ = final_homes(**case)
    assert [tuple(row) for row in resolve(case, "greedy").codes_NL[:, :-1].tolist()] == homes


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_order_of_rows_does_not_matter(seed):
    case = crowded_catalogue(seed, most_products=30)
    rows = np.random.default_rng(seed).permutation(len(case["codes"]))
    for method in SOLVERS:
        straight, shuffled = resolve(case, method), resolve(case, method, rows)
        assert np.array_equal(straight.codes_NL[rows], shuffled.codes_NL)
        assert np.array_equal(straight.cost_N[rows], shuffled.cost_N)
        assert straight.report == shuffled.report


def regions_of(case):
    """`closed_regions` of a case, with the check that each depth is asked for once, all its nodes together."""
    space, ids, taken = packed(case)
    everyone, asked = np.concatenate([ids, taken]), []

    def count(depth, nodes_M):
        asked.append(depth)
        assert nodes_M.dtype == np.int64 and (np.diff(nodes_M) > 0).all()
        return (space.prefix_of(everyone, depth)[:, None] == nodes_M).sum(axis=0)

    home, size = np.unique(space.prefix_of(everyone, space.levels - 1), return_counts=True)
    regions = closed_regions(home[size > space.codes_per_level[-1]], count, space)
    assert len(set(asked)) == len(asked)
    return regions


@settings(max_examples=500, deadline=None)
@given(seed=SEEDS, method=st.sampled_from(sorted(SOLVERS)))
def test_regions_and_single_prefixes_can_be_resolved_alone(seed, method):
    case = crowded_catalogue(seed, most_levels=4, most_codes=6, most_products=40, whole=seed % 2 == 0)
    space, ids, taken = packed(case)
    whole, regions = resolve(case, method), regions_of(case)
    everyone = [tuple(row) for row in np.concatenate([case["codes"], case["occupied"]]).tolist()]
    expected = smallest_regions(everyone, space.codes_per_level)
    assert regions == sorted((len(node), number_of(node, space)) for node in expected)
    alone = np.ones(len(ids), bool)
    for depth, node in regions:
        alone &= space.prefix_of(ids, depth) != node
    leaves = np.unique(space.prefix_of(ids[alone], space.levels - 1)).tolist()
    seen = np.zeros(len(ids), int)
    for depth, node in [*regions, *((space.levels - 1, leaf) for leaf in leaves)]:
        rows = np.flatnonzero(space.prefix_of(ids, depth) == node)
        part = resolve(case, method, rows, space.unpack(taken[space.prefix_of(taken, depth) == node]))
        assert np.array_equal(part.codes_NL, whole.codes_NL[rows])
        assert np.array_equal(part.cost_N, whole.cost_N[rows])
        seen[rows] += 1
    assert (seen == 1).all()


def number_of(node, space):
    """A prefix as one integer, digit by digit."""
    number = 0
    for code, codes in zip(node, space.codes_per_level):
        number = number * codes + code
    return number


def test_a_region_swallows_the_smaller_one_inside_it():
    space = DocidSpace((2, 3, 2, 2))
    held = {2: {0: 4, 1: 5, 4: 4}, 1: {0: 12}}
    asked = []

    def count(depth, nodes_M):
        asked.append((depth, nodes_M.tolist()))
        return np.array([held[depth][node] for node in nodes_M.tolist()])

    assert closed_regions(np.array([0, 2, 8]), count, space) == [(1, 0), (2, 4)]
    assert asked == [(2, [0, 1, 4]), (1, [0])]


@pytest.mark.parametrize("codes_per_level", [(6,), (2, 3), (1, 2, 3)])
def test_more_products_than_the_root_holds_are_refused_with_the_counts(codes_per_level):
    space = DocidSpace(codes_per_level)
    with pytest.raises(CapacityError, match="7 products and occupied IDs need as many IDs, but .* has only 6; train a"):
        closed_regions(np.array([0]), lambda depth, nodes_M: np.full(len(nodes_M), 7), space)


def test_no_overfull_prefix_means_no_region_and_no_question():
    assert closed_regions(np.empty(0, np.int64), None, DocidSpace((4, 4))) == []
