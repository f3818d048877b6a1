"""A parquet file that says which one it is where reading on fails, long after it was opened."""

import contextlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from catid2_ray.artifacts import patience
from catid2_ray.errors import InputError


class ParquetFile(pq.ParquetFile):
    """`where`: its URI; `doing`: what makes a StorageError of a failure; `patiently`: calls a function again while the store is
    away. The store that opens it sets all three."""

    where: str = ""
    doing: Callable = contextlib.nullcontext
    patiently: Callable

    def iter_batches(self, *arguments, **options):
        with self._reading():
            yield from super().iter_batches(*arguments, **options)

    def read_row_group(self, *arguments, **options):
        read = super().read_row_group
        with self._reading():
            return self.patiently(lambda: read(*arguments, **options))

    def read_row_groups(self, *arguments, **options):
        read = super().read_row_groups
        with self._reading():
            return self.patiently(lambda: read(*arguments, **options))

    @contextlib.contextmanager
    def _reading(self):
        with self.doing():
            try:
                yield
            except (pa.ArrowInvalid, OSError) as error:
                # Arrow raises an OSError without a number for pages that do not unpack.
                if getattr(error, "errno", None) is not None or patience.passes(error) or patience.is_refusal(error):
                    raise
                raise InputError(f"{self.where} is damaged inside: {error}") from None
