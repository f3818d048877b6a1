"""Hashes keep the values that parts, groups and draws of existing releases follow from."""

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.hashing import bucket_of, hash_of_text, mixed, splitmix, uniform
from catid2_ray.identifiers.suffixes import _hashes
from catid2_ray.quantizer.sampler import mask_categories

KEYS = np.array([0, 1, 7, 2**40, -1])


def splitmix64(state: int) -> int:
    """One output, as Steele, Lea and Flood print it (2014, figure 17)."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_splitmix_is_splitmix64_and_spreads_over_buckets():
    expected = [splitmix64(int(key) % 2**64) for key in KEYS]
    assert splitmix(KEYS).tolist() == expected
    assert expected[0] == 0xE220A8397B1DCDAF  # the first output of the seed 0
    assert mixed(KEYS + np.int64(0x9E3779B97F4A7C15 - 2**64)).tolist() == expected
    assert bucket_of(KEYS, 97).tolist() == [key % 97 for key in expected] == [49, 27, 19, 7, 52]


def test_draws_follow_from_keys_and_numbers_alone():
    drawn = [x.hex() for x in uniform(KEYS, 5, 3)]
    assert drawn == [
        "0x1.37e5d2b80cf30p-5", "0x1.8edb1c2c97143p-1", "0x1.0fb7741aebf55p-1", "0x1.f5ec60ae5d001p-1",
        "0x1.d79664d32ddfcp-1",
    ]  # fmt: skip
    assert uniform(KEYS[:2], 5, 3).tolist() == uniform(KEYS, 5, 3)[:2].tolist()


@pytest.mark.parametrize("share, kept", [(0.4, [True, True, True, False]), (0.42, [True, True, False, False])])
def test_which_categories_are_masked_stays(share, kept):
    """Draws of the ids with seed 5: 0.727, 0.651, 0.402, 1.3e-5."""
    masked_N1 = mask_categories(KEYS[:4, None], depth=0, share=share, seed=5)
    assert (masked_N1[:, 0] >= 0).tolist() == kept


def test_groups_drawn_by_product_id_stay():
    expected = [11677332526905512637, 14410769421299063353, 14265669739830907716]
    assert _hashes(np.array(["a", "bc", "é日"]), 9).tolist() == expected


def test_texts_hash_alike_from_arrow_and_numpy():
    texts = ["a", "bc", "é日", ""]
    expected = [13950350942979735504, 6429939465925716527, 12284262926043797380, 1760245841805064774]
    assert hash_of_text(np.array(texts, object)).tolist() == expected
    assert hash_of_text(pa.array(texts, pa.large_string())).tolist() == expected
    assert hash_of_text(pa.chunked_array([texts[:2], texts[2:]])).tolist() == expected
    assert hash_of_text(pa.chunked_array([], pa.string())).tolist() == []
