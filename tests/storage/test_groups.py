"""Files that bring rows together: every group its own rows in order, empty ones too, the same bytes each time."""

import numpy as np
import pyarrow as pa

from catid2_ray.hashing import bucket_of
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, read_groups, write_groups


def test_rows_come_back_by_group_in_order(store):
    rng = np.random.default_rng(0)
    group_N, vector_ND = rng.integers(0, 7, 500), rng.normal(size=(500, 3)).astype(np.float32)
    group_N[group_N == 4] = 5
    names = [f"p{number}" for number in range(500)]
    table = pa.table({"name": names, "vector": fixed_lists(vector_ND, pa.float32()), "row": np.arange(500)})
    write_groups(store, "x/a.arrow", table, group_N, 8)
    for group in range(8):
        found = read_group(store, "x/a.arrow", group)
        rows = np.flatnonzero(group_N == group)
        assert found["row"].to_pylist() == rows.tolist() and found["name"].to_pylist() == [f"p{row}" for row in rows]
        np.testing.assert_array_equal(matrix(found["vector"]).reshape(-1, 3), vector_ND[rows])
    assert read_groups(store, "x/a.arrow", ["name"]).column_names == ["name"]
    assert read_group(store, "x/a.arrow", 3, ["row", "name"]).num_rows == (group_N == 3).sum()
    assert read_groups(store, "x/a.arrow", ["row"])["row"].to_pylist() == np.argsort(group_N, kind="stable").tolist()
    first = store.read("x/a.arrow")
    write_groups(store, "x/a.arrow", table, group_N, 8)
    assert store.read("x/a.arrow") == first


def test_near_keys_spread_over_the_buckets():
    count = np.bincount(bucket_of(np.arange(70_000), 7), minlength=7)
    assert len(count) == 7 and count.min() > 9_500 and count.max() < 10_500
    assert (bucket_of(np.arange(50), 1) == 0).all()
    np.testing.assert_array_equal(bucket_of(np.arange(50)[::-1], 9), bucket_of(np.arange(50), 9)[::-1])
