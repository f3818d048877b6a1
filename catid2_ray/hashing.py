"""Hashes of integers and texts, the same on every machine and in every release: who goes to which part, bucket, group or draw.

None of these may ever change: parts, groups and samples of releases that exist follow from them.

N keys.
"""

import numpy as np
import pyarrow as pa

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's step from one state to the next


def mixed(key_N: np.ndarray) -> np.ndarray:
    """uint64 N: splitmix64's finaliser, a permutation of all 64-bit numbers whose output bits are all well mixed."""
    key_N = np.asarray(key_N).astype(np.uint64)
    key_N = (key_N ^ (key_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key_N = (key_N ^ (key_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key_N ^ (key_N >> np.uint64(31))


def splitmix(key_N: np.ndarray) -> np.ndarray:
    """uint64 N: splitmix64's output for each state, which sends 0 elsewhere too."""
    return mixed(np.asarray(key_N).astype(np.uint64) + np.uint64(GOLDEN))


def share_of(hash_N: np.ndarray) -> np.ndarray:
    """float64 N in [0, 1): where each hash lies among all."""
    return (hash_N >> np.uint64(11)) * 2.0**-53


def uniform(key_N: np.ndarray, *numbers: int) -> np.ndarray:
    """float64 N in [0, 1): a draw for each key, another one for other numbers."""
    hash_N = np.asarray(key_N).astype(np.uint64)
    for number in numbers:
        hash_N = mixed(hash_N + np.uint64(GOLDEN * (2 * int(number) + 1) & (2**64 - 1)))
    return share_of(hash_N)


def bucket_of(key_N: np.ndarray, buckets: int) -> np.ndarray:
    """int64 N in 0 … buckets − 1, so that near keys spread."""
    return (splitmix(key_N) % np.uint64(buckets)).astype(np.int64)


def hash_of_text(texts: np.ndarray | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64 N: SipHash of each text's UTF-8, as pandas computes it."""
    import pandas as pd  # here: half a second, and most who hash do so with integers

    if not isinstance(texts, np.ndarray):
        texts = texts.cast(pa.string()).to_numpy(zero_copy_only=False)
    return pd.util.hash_array(texts.astype(object), categorize=False)
