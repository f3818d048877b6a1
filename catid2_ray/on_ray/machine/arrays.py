"""Arrow columns of fixed-size lists as 2-D numpy arrays and back, without Python objects."""

import numpy as np
import pyarrow as pa


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """N×D from a column of fixed_size_list<T>[D] without nulls; a 1-D column comes back as N."""
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.num_chunks else pa.array([], type=column.type)
    if not pa.types.is_fixed_size_list(combined.type):
        return combined.to_numpy(zero_copy_only=False)
    width = combined.type.list_size
    return combined.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def fixed_lists(values_ND: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    """fixed_size_list<kind>[D] from an N×D array."""
    values = pa.array(np.ascontiguousarray(values_ND).reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(values, values_ND.shape[1])
