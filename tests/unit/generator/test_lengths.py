"""Groups of like length: the least padding of all groupings, never more groups than needed, every row once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.generator.batches import MOST_PADDING, length_groups
from tests.oracles.examples import least_padding


def padding_share(length_B, groups):
    """Share 0 … 1 of padding among all tokens, where each group is padded to its longest row."""
    length_B = np.maximum(np.asarray(length_B), 1)
    return 1.0 - int(length_B.sum()) / sum(len(row_G) * int(length_B[row_G].max()) for row_G in groups)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=14),
    least=st.integers(1, 4),
    most=st.integers(1, 4),
    padding=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_no_grouping_has_less_padding_with_as_few_groups(lengths, least, most, padding):
    groups = length_groups(np.array(lengths), least=least, most=most, padding=padding)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all((np.diff(row_G) > 0).all() for row_G in groups)
    assert len(groups) == 1 or min(map(len, groups)) >= least
    best, real = least_padding(lengths, least=least, most=most), sum(max(1, length) for length in lengths)
    enough = [count for count, tokens in sorted(best.items()) if 1 - real / tokens <= padding]
    goal = best[enough[0]] if enough else min(best.values())
    assert padding_share(lengths, groups) == pytest.approx(1 - real / goal)
    if enough:
        assert len(groups) == enough[0]


def test_padding_of_a_shops_batch_stays_under_a_tenth():
    generator = np.random.default_rng(0)
    length_B = np.where(generator.random(256) < 0.4, generator.poisson(4, 256) + 2, generator.poisson(9, 256) + 3)
    length_B = np.minimum(length_B, 24)
    whole = [np.arange(256)]
    assert padding_share(length_B, whole) > 0.5
    groups = length_groups(length_B, least=8)  # as under a T5-base
    assert padding_share(length_B, groups) <= MOST_PADDING and len(groups) <= 8
