"""The category tree of one run: a frozen integer for every category, depth by depth.

A category is its full path from the root, never its name: "Accessories" under two parents is two categories. Ids count
from 0 at each depth in the sorted order of the paths, so the same categories give the same ids and the same digest.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError

Path = tuple[str, ...]

PATH_SEPARATOR = "\x1f"  # "unit separator": no shop writes it into a category's name, unlike ">" or "/"


@dataclass(frozen=True)
class Taxonomy:
    """`levels[d]`: the sorted full paths of length d + 1; a path's place in it is its id at depth d + 1."""

    levels: tuple[tuple[Path, ...], ...]

    @classmethod
    def build(cls, paths: Iterable[Path], *, depth: int) -> "Taxonomy":
        """The tree of all `paths`, cut to `depth` levels; repeated paths are as one. Raises InputError."""
        prefixes: list[set[Path]] = [set() for _ in range(depth)]
        for path in dict.fromkeys(tuple(path) for path in paths):
            if not all(isinstance(name, str) and name.strip() and PATH_SEPARATOR not in name for name in path):
                raise InputError(f"category path {path!r} has an empty or unreadable name; clean it before the tree")
            for d in range(min(depth, len(path))):
                prefixes[d].add(path[: d + 1])
        return cls(tuple(tuple(sorted(level)) for level in prefixes))

    @property
    def depth(self) -> int:
        return len(self.levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of categories at each depth."""
        return tuple(len(level) for level in self.levels)

    @cached_property
    def _ids(self) -> dict[Path, int]:
        return {path: i for level in self.levels for i, path in enumerate(level)}

    def path_ids(self, path: Path, *, grown: bool = False) -> list[int]:
        """`depth` ids of one path, −1 below its end; names below `depth` are ignored.

        A category that the tree does not hold raises InputError, or, where the catalogue has `grown` since, gets −1 as all
        below it.
        """
        path = tuple(path)[: self.depth]
        if grown:
            path = next(path[:d] for d in range(len(path), -1, -1) if d == 0 or path[:d] in self._ids)
        try:
            ids = [self._ids[path[: d + 1]] for d in range(len(path))]
        except KeyError as error:
            raise InputError(
                f"category path {' > '.join(path)!r} is not in this run's taxonomy of {self.sizes} categories "
                f"(digest {self.digest[:12]}); build the taxonomy again from the table that holds it"
            ) from error
        return ids + [-1] * (self.depth - len(path))

    def category_ids(self, category_path_column: pa.ChunkedArray | pa.Array, *, grown: bool = False) -> np.ndarray:
        """int32 N×depth for a list<string> column of N rows, −1 where a path is shorter or null.

        Raises InputError for a path that the taxonomy does not hold, unless `grown`: see `path_ids`.
        """
        column = category_path_column
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks() if column.num_chunks else pa.array([], column.type)
        if pc.list_flatten(column).null_count:
            raise InputError("column category_path holds a null category name; run the product check first")
        joined = pc.fill_null(pc.binary_join(column, PATH_SEPARATOR), "").dictionary_encode()
        paths = [tuple(text.split(PATH_SEPARATOR)) if text else () for text in joined.dictionary.to_pylist()]
        table_PH = np.array([self.path_ids(path, grown=grown) for path in paths], np.int32).reshape(
            len(paths), self.depth
        )
        return table_PH[joined.indices.to_numpy(zero_copy_only=False)]

    def to_json(self) -> str:
        """One line of JSON, the same bytes for the same categories."""
        return json.dumps({"levels": self.levels}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Taxonomy":
        """The inverse of `to_json`."""
        try:
            levels = json.loads(text)["levels"]
            return cls(tuple(tuple(tuple(path) for path in level) for level in levels))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'not a taxonomy: expected {{"levels": [[path, …], …]}}, found {text[:80]!r}') from error

    @cached_property
    def digest(self) -> str:
        """sha256, hexadecimal, of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
