"""Unique IDs: products that share an ID are spread over the free codes of their prefix at the least total distance.

A Sinkhorn plan is rounded to one code per product and then *proved*: its prices bound the optimum from below. Where
that bound does not close to 0.1 % the next, sharper plan is tried, and at last the prefix is solved exactly. Everything
runs in product_id order, and every number of a prefix is computed from that prefix alone, so neither row order nor block
size can change an ID.

N products, M occupied IDs, L levels, K codes, Z latent width; P rows in question; B prefixes of one batch, G products
in each, C candidate codes.
"""

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.identifiers.ledger import id_column, refuse_infinite, refuse_repeats
from catid2_ray.identifiers.overflow import codeword_sum, is_member, spill, squared, taken_codes

BLOCK_NUMBERS = 2**21  # float64 numbers of one block of costs, 16 MiB
PLAN_NUMBERS = 2**17  # of one block of plans; 1 MiB stays in the processor's cache
SINKHORN_REGS = (0.1, 0.03, 0.01, 0.003, 0.001)  # entropy weights, in units of a prefix's mean extra distance
SINKHORN_ITERATIONS = 20  # at each weight
PROOF_TOLERANCE = 0.001  # a rounded plan is kept when cost <= (1 + this) * its lower bound
FAR = 1e4  # normalised cost of a column that no product may take


class UniqueIds(NamedTuple):
    """`codes_NL` int64, no two rows equal; `moved_N` bool, the ID changed; `cost_N` float64, the squared distance of
    the product's latent to its new ID's codewords minus that to its old ID's; `report`, counts by name."""

    codes_NL: np.ndarray
    moved_N: np.ndarray
    cost_N: np.ndarray
    report: dict


def assign_unique(
    codes_NL, residual_NZ, codebook_LKZ, product_ids, *, occupied=None, method: str = "sinkhorn"
) -> UniqueIds:
    """Give every product an ID of its own, touching only prefixes of L − 1 codes in which some ID is shared.

    `codes_NL`: integers. `residual_NZ`: the input of the last level, latent minus the codewords of the first L − 1.
    `codebook_LKZ`: an array, or one array K_l×Z per level. `product_ids`: N different strings, a list,
    numpy or Arrow array. `occupied`: integers M×L, IDs that never move and are never given. `method`: "sinkhorn" (POT),
    at most 0.1 % above the least summed squared distance of every prefix, "exact" (linear assignment), that least sum,
    or "greedy" (nearest free code, in product_id order). In a touched prefix all products take part, also those whose
    own ID was not shared. Of products at one point the lower product_id gets the nearer code, of equally near codes the
    lower; all other ties are settled by the prefix's rows alone, in product_id order.

    A prefix with more products than free codes sends the rest away, over all prefixes in the order of (added cost,
    product_id), each to the nearest sibling prefix with room, level by level upwards; who receives is solved again.
    Pure function of the set of rows; rows come back in the order they came in.

    Raises CapacityError when N + M > ∏K_l, before any work; InputError for codes out of range, residuals that are not
    finite, repeated product_ids, and occupied IDs out of range or repeated.

    Source: Sinkhorn post-processing, CAT-ID² (arXiv 2511.01461) after LC-Rec (2311.09049); one assignment per prefix,
    ZCR (2605.25330).
    """
    books = [np.asarray(book, dtype=np.float64) for book in codebook_LKZ]
    space = DocidSpace(tuple(len(book) for book in books))
    if method not in SOLVERS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(SOLVERS)}")
    count = len(codes_NL) + (0 if occupied is None else len(occupied))
    if count > space.capacity:
        raise CapacityError(
            f"{len(codes_NL)} products and {count - len(codes_NL)} occupied IDs need {count} IDs, but codes_per_level "
            f"{list(space.codes_per_level)} has only {space.capacity}; train a quantizer with more levels or codes"
        )
    codes_NL, residual_NZ, order_N, taken_M = _checked(space, books, codes_NL, residual_NZ, product_ids, occupied)
    old_N = space.pack(codes_NL)
    home_N = space.prefix_of(old_N, space.levels - 1)
    touched = colliding_prefixes(np.concatenate([old_N, taken_M]), space)
    spilled = spill(space, books, codes_NL, residual_NZ, home_N, taken_M, touched)
    home_N[spilled.row_P] = spilled.home_P

    new_N, cost_N = old_N.copy(), np.zeros(len(old_N))
    rows_P = np.flatnonzero(is_member(np.union1d(touched, spilled.home_P), home_N))
    repaired, last = 0, space.codes_per_level[-1]
    for rows_BG in _blocks(rows_P, home_N, last):
        rows_Q = rows_BG.ravel()
        point_QZ = _points(space, books, codes_NL[rows_Q], residual_NZ[rows_Q], home_N[rows_Q])
        taken_BK = taken_codes(taken_M, home_N[rows_BG[:, 0]], last)
        code_BG, failed = _assign(point_QZ.reshape(*rows_BG.shape, -1), books[-1], taken_BK, SOLVERS[method])
        code_Q, repaired = code_BG.ravel(), repaired + failed
        new_N[rows_Q] = home_N[rows_Q] * last + code_Q
        before_Q = squared(residual_NZ[rows_Q] - books[-1][codes_NL[rows_Q, -1]])
        cost_N[rows_Q] = squared(point_QZ - books[-1][code_Q]) - before_Q
    moved_N = new_N != old_N
    cost_N[~moved_N] = 0.0
    report = _report(space, old_N, new_N, taken_M, touched, len(spilled.row_P))
    report |= {"added_cost": float(cost_N.sum()), "method": method, "solved_exactly_instead": repaired}
    assert report["duplicates_after"] == 0, f"{report['duplicates_after']} IDs are still shared: {report}"
    back_N = np.empty_like(order_N)
    back_N[order_N] = np.arange(len(order_N))
    return UniqueIds(space.unpack(new_N)[back_N], moved_N[back_N], cost_N[back_N], report)


def colliding_prefixes(packed_N, space: DocidSpace) -> np.ndarray:
    """Sorted int64 prefixes of L − 1 codes (`DocidSpace.prefix_of`) in which some ID of `packed_N` occurs twice.

    Only rows in these prefixes have to be brought together for `assign_unique`; append the packed occupied IDs.
    """
    ids, count = np.unique(np.asarray(packed_N, dtype=np.int64), return_counts=True)
    return np.unique(space.prefix_of(ids[count > 1], space.levels - 1))


def _checked(space, books, codes_NL, residual_NZ, product_ids, occupied):
    """The inputs in product_id order, that order, and the occupied IDs packed and sorted."""
    width = books[0].shape[-1]
    if any(book.ndim != 2 or book.shape[1] != width or not np.isfinite(book).all() for book in books):
        raise InputError(f"codebooks must be finite arrays K_l×Z of one width, found {[book.shape for book in books]}")
    codes_NL, product_ids = space.check(np.asarray(codes_NL)), id_column(product_ids)
    residual_NZ = np.asarray(residual_NZ)
    if residual_NZ.shape != (len(codes_NL), width) or len(product_ids) != len(codes_NL):
        raise InputError(
            f"{len(codes_NL)} rows of codes need residuals of shape ({len(codes_NL)}, {width}) and as many "
            f"product_ids, found {residual_NZ.shape} and {len(product_ids)}"
        )
    order_N = pc.sort_indices(product_ids).to_numpy().astype(np.int64)
    refuse_repeats(product_ids.take(order_N), "the catalogue")
    refuse_infinite(residual_NZ, product_ids)
    taken_M = np.empty(0, np.int64)
    if occupied is not None and len(occupied):
        try:
            taken_M = np.sort(space.pack(np.asarray(occupied)))
        except InputError as error:
            raise InputError(f"occupied IDs: {error}") from None
    again = np.flatnonzero(taken_M[1:] == taken_M[:-1])
    if len(again):
        text = space.text(space.unpack(taken_M[again[:1]])[0])
        raise InputError(f"occupied IDs: {text} occurs twice ({len(again)} repeats in all); the ledger is damaged")
    return codes_NL[order_N], np.ascontiguousarray(residual_NZ[order_N]), order_N, taken_M


def _blocks(rows_P, home_N, codes):
    """`rows_P` prefix by prefix, as arrays B×G of B prefixes with G products each, in product_id order."""
    rows_P = rows_P[np.argsort(home_N[rows_P], kind="stable")]
    first = np.flatnonzero(np.diff(home_N[rows_P], prepend=-1))
    size = np.diff(first, append=len(rows_P))
    for members in np.flatnonzero(np.bincount(size)).tolist():
        groups = np.flatnonzero(size == members)
        for block in np.array_split(groups, min(len(groups), -(-len(groups) * members * codes // BLOCK_NUMBERS))):
            yield rows_P[first[block][:, None] + np.arange(members)]


def _points(space, books, codes_QL, residual_QZ, home_Q):
    """float64 Q×Z, what the last codeword has to meet: the residual, worked out anew where `home_Q` is not its own."""
    point_QZ = residual_QZ.astype(np.float64)
    away = np.flatnonzero(space.prefix_of(space.pack(codes_QL), space.levels - 1) != home_Q)
    latent_QZ = point_QZ[away] + codeword_sum(books[:-1], codes_QL[away])
    target_QL = space.unpack(home_Q[away] * space.codes_per_level[-1])
    point_QZ[away] = latent_QZ - codeword_sum(books[:-1], target_QL)
    return point_QZ


def _assign(point_BGZ, book_KZ, taken_BK, solver):
    """Last codes int64 B×G, all different inside one prefix, and how many prefixes the solver gave up on."""
    count, members, width = point_BGZ.shape
    cost_BGK = cdist(point_BGZ.reshape(-1, width), book_KZ, "sqeuclidean").reshape(count, members, -1)
    np.copyto(cost_BGK, np.inf, where=taken_BK[:, None])
    code_BG, failed = _solve(cost_BGK, solver)
    return _order_twins(code_BG, cost_BGK, point_BGZ), failed


def _order_twins(code_BG, cost_BGK, point_BGZ):
    """Among products at one point, the lower product_id takes the nearer of their codes."""
    # Equal points have equal sums. Only prefixes with equal sums are looked at; there coordinates decide, in row order.
    key_BG = np.sort((point_BGZ * np.sqrt(2.0 + np.arange(point_BGZ.shape[2]))).sum(axis=2), axis=1)
    tied = np.flatnonzero((key_BG[:, 1:] == key_BG[:, :-1]).any(axis=1))
    if not len(tied):
        return code_BG
    order_TG = np.lexsort(np.moveaxis(point_BGZ[tied], 2, 0), axis=-1)
    point_TGZ = np.take_along_axis(point_BGZ[tied], order_TG[..., None], axis=1)
    new_TG = np.ones(order_TG.shape, bool)
    new_TG[:, 1:] = (point_TGZ[:, 1:] != point_TGZ[:, :-1]).any(axis=2)
    own_BG = np.take_along_axis(cost_BGK, code_BG[..., None], axis=2)[..., 0]
    own_TG, sorted_TG = (np.take_along_axis(array[tied], order_TG, axis=1) for array in (own_BG, code_BG))
    near = np.lexsort((sorted_TG.ravel(), own_TG.ravel(), np.cumsum(new_TG)))
    ordered_TG = np.empty_like(order_TG)
    np.put_along_axis(ordered_TG, order_TG, sorted_TG.ravel()[near].reshape(order_TG.shape), axis=1)
    code_BG[tied] = ordered_TG
    return code_BG


def _solve(cost_BGK, solver):
    """Codes int64 B×G. The G nearest free codes of each of G products hold an optimum, so all others are left out."""
    count, members, codes = cost_BGK.shape
    reach_BG = np.partition(cost_BGK, members - 1, axis=2)[..., members - 1]
    wanted_BK = (cost_BGK <= reach_BG[..., None]).any(axis=1)
    column_BK = np.argsort(~wanted_BK, axis=1, kind="stable")
    # One column more than products, in powers of two: few shapes, and each a function of its own prefix alone.
    width_B = 2 ** np.ceil(np.log2(np.maximum(wanted_BK.sum(axis=1), members + 1))).astype(np.int64)
    width_B = np.minimum(width_B, codes + 1)
    code_BG, repaired = np.empty((count, members), np.int64), 0
    for width in np.flatnonzero(np.bincount(width_B)):
        part = np.flatnonzero(width_B == width)
        column_BC = column_BK[part, :width]
        cost_BGC = np.full((len(part), members, width), np.inf)
        own_BGC = np.take_along_axis(cost_BGK[part], column_BC[:, None], axis=2)
        usable = np.take_along_axis(wanted_BK[part], column_BC, axis=1)[:, None]
        np.copyto(cost_BGC[..., : own_BGC.shape[2]], own_BGC, where=usable)
        pick_BG, failed = solver(cost_BGC)
        code_BG[part] = np.take_along_axis(column_BC, pick_BG, axis=1)
        repaired += failed
    return code_BG, repaired


def _greedy(cost_BGC):
    """Each product in turn takes its nearest free column."""
    cost_BGC, rows_B = cost_BGC.copy(), np.arange(len(cost_BGC))
    pick_BG = np.empty(cost_BGC.shape[:2], np.int64)
    for member in range(cost_BGC.shape[1]):
        pick_BG[:, member] = cost_BGC[:, member].argmin(axis=1)
        cost_BGC[rows_B, :, pick_BG[:, member]] = np.inf
    return pick_BG, 0


def _exact(cost_BGC):
    """The optimum, prefix by prefix."""
    usable_BC = np.isfinite(cost_BGC[:, 0])
    full = np.flatnonzero(usable_BC.sum(axis=1) == cost_BGC.shape[1])
    if len(full):
        # Every code will be used, so what it costs all products alike cannot matter, and without it the search is short.
        alike_BC = np.where(usable_BC[full], cost_BGC[full].mean(axis=1), 0.0)
        cost_BGC = cost_BGC.copy()
        cost_BGC[full] -= alike_BC[:, None]
    return np.array([linear_sum_assignment(cost_GC)[1] for cost_GC in cost_BGC], np.int64), 0


def _sinkhorn(cost_BGC):
    """Plans, block by block; see `_plan`."""
    step = max(1, PLAN_NUMBERS // cost_BGC[0].size)
    pick, failed = zip(*(_plan(cost_BGC[start : start + step]) for start in range(0, len(cost_BGC), step)))
    return np.concatenate(pick), sum(failed)


def _plan(cost_BGC):
    """Entropic plans of falling entropy, each rounded and kept where its prices prove it, or at last the optimum.

    A last row of no cost takes the columns that the products leave, which makes the rectangular problem balanced.
    """
    count, members, width = cost_BGC.shape
    usable_BC, base_BG = np.isfinite(cost_BGC[:, 0]), cost_BGC.min(axis=2)
    extra_BGC = np.where(usable_BC[:, None], cost_BGC - base_BG[..., None], 0.0)
    unit_B = extra_BGC.sum(axis=(1, 2)) / (members * usable_BC.sum(axis=1))
    unit_B[unit_B == 0] = 1.0
    problem = np.zeros((count, members + 1, width))
    problem[:, :-1] = np.where(usable_BC[:, None], extra_BGC / unit_B[:, None, None], FAR)
    mass_BR = np.ones((count, members + 1))
    mass_BR[:, -1] = width - members
    floor_B = base_BG.sum(axis=1) / unit_B
    gain_BR, price_BC = np.zeros((count, members + 1)), np.zeros((count, width))
    pick_BG, left = np.empty((count, members), np.int64), np.arange(count)
    from ot.batch import bregman_projection_batch  # here: it brings scikit-learn, a second in every worker

    for reg in SINKHORN_REGS:
        # Prices so far go into the exponent: no overflow, no logarithms inside, and the sharper plan starts from them.
        with np.errstate(all="ignore"):
            result = bregman_projection_batch(
                np.exp((gain_BR[..., None] + price_BC[:, None] - problem) / reg),
                mass_BR,
                np.ones_like(price_BC),
                max_iter=SINKHORN_ITERATIONS,
                tol=0.0,
            )
            gain_BR += reg * np.log(result["potentials"][0])
            price_BC += reg * np.log(result["potentials"][1]) + gain_BR[:, -1:]
            gain_BR -= gain_BR[:, -1:]
        pick_BG[left] = _round(np.where(usable_BC[:, None], result["T"][:, :members], -0.5))
        spent_B, bound_B = _proof(problem[:, :-1], usable_BC, pick_BG[left], price_BC)
        open_B = ~(floor_B + spent_B <= (1 + PROOF_TOLERANCE) * (floor_B + bound_B))
        if not open_B.any():
            return pick_BG, 0
        left, problem, usable_BC, floor_B, mass_BR, gain_BR, price_BC = (
            array[open_B] for array in (left, problem, usable_BC, floor_B, mass_BR, gain_BR, price_BC)
        )
    pick_BG[left], _ = _exact(cost_BGC[left])
    return pick_BG, len(left)


def _proof(cost_BGC, usable_BC, pick_BG, price_BC):
    """The cost of each rounded plan, and a lower bound of the least one."""
    price_BC = np.where(usable_BC, np.minimum(price_BC, 0.0), 0.0)
    taken_BC = np.zeros(usable_BC.shape, bool)
    np.put_along_axis(taken_BC, pick_BG, True, axis=1)
    bound_B = np.maximum(_dual(cost_BGC, price_BC), _dual(cost_BGC, np.where(taken_BC, price_BC, 0.0)))
    return np.take_along_axis(cost_BGC, pick_BG[..., None], axis=2).sum(axis=(1, 2)), bound_B


def _dual(cost_BGC, price_BC):
    """Lower bound of each least total cost, from any prices <= 0 of the columns (duality of the assignment problem)."""
    gain_BG = (cost_BGC - price_BC[:, None]).min(axis=2)
    price_BC = np.minimum((cost_BGC - gain_BG[..., None]).min(axis=1), 0.0)
    return gain_BG.sum(axis=1) + price_BC.sum(axis=1)


SOLVERS = {"sinkhorn": _sinkhorn, "exact": _exact, "greedy": _greedy}


def _round(plan_BGC):
    """Take the plan's largest entry, strike out its row and column, repeat; ties go to the lower product_id."""
    count, members, width = plan_BGC.shape
    pick_BG, rows_B = np.empty((count, members), np.int64), np.arange(count)
    for _ in range(members):
        member_B, column_B = np.divmod(plan_BGC.reshape(count, -1).argmax(axis=1), width)
        pick_BG[rows_B, member_B] = column_B
        plan_BGC[rows_B, member_B] = -1.0
        plan_BGC[rows_B, :, column_B] = -1.0
    return pick_BG


def _report(space, old_N, new_N, taken_M, touched, overflowed):
    """Counts by name; a collision is a product beyond the first of its ID, or one whose ID is occupied."""
    home_N = space.prefix_of(old_N, space.levels - 1)
    size = np.unique(home_N[is_member(touched, home_N)], return_counts=True)[1]

    def surplus(packed_N):
        everyone = np.sort(np.concatenate([packed_N, taken_M]))
        return int((everyone[1:] == everyone[:-1]).sum())

    before = surplus(old_N)
    return {
        "products": len(old_N),
        "occupied": len(taken_M),
        "collisions_before": before,
        "collision_rate_before": before / max(len(old_N), 1),
        "duplicates_after": surplus(new_N),
        "colliding_prefixes": len(touched),
        "products_in_colliding_prefixes": int(size.sum()),
        "largest_prefix": int(size.max(initial=0)),
        "moved": int((new_N != old_N).sum()),
        "overflowed": overflowed,
    }
