"""The net state of all changes to a live trie, as Arrow tables: what a snapshot holds, and what dead rows are left out of.

A newcomer counts while its name means its row, live or withdrawn; one whose name was put again is dropped. A state made from a
view gives the same answers when it is applied to the release as it was published, in one go.

D newcomers that count, L levels, W width of a vector.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.filter_columns import Later
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.inserted import Inserted
from catid2_ray.retrieval.live_nodes import NodesOfView
from catid2_ray.retrieval.live_view import LiveView, codes_of
from catid2_ray.retrieval.products import Newcomer, Products


def followed(view: LiveView, gone: np.ndarray, come: np.ndarray) -> LiveView:
    """The view with the vectors of its nodes, from one in which the rows `gone` were live and `come` were not."""
    rows = np.concatenate((gone, come))
    if view.nodes is None or (not len(rows) and view.nodes.inserted is view.inserted):
        return view
    if not len(rows):
        return replace(view, nodes=replace(view.nodes, inserted=view.inserted))
    return replace(
        view, nodes=view.nodes.with_rows(view, rows, np.arange(len(rows)) >= len(gone), codes_of(view, rows))
    )


def state_of(view: LiveView, names: dict[int, str], base_ids) -> dict[str, pa.Table]:
    """The state of `view`, as `LiveTrie.state` describes it. `names`: of the inserted products that count, by i of
    row N + i; `base_ids`: product ids of the base's rows (Arrow), or None."""
    at_D, names = np.array(sorted(names), np.int64), [names[at] for at in sorted(names)]
    space, products = DocidSpace(view.codes_per_level), view.products
    codes_DL = codes_of(view, view.base.rows + at_D).astype(np.int32)
    newcomers = {
        "product_id": pa.array(names, pa.string()),
        "codes": pa.FixedSizeListArray.from_arrays(pa.array(codes_DL.ravel()), space.levels),
        "live": pa.array(view.live_inserted.allows(at_D)),
    }
    if products is not None:
        newcomers["title"] = pa.array([products.newcomers[at].title for at in at_D.tolist()], pa.string())
        if products.values is not None:
            newcomers["value"] = _nullable(products.values.of(view.base.rows + at_D))
        if products.grown_vectors is not None:
            half_DW = products.grown_vectors.grown.rows[at_D]
            newcomers["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(half_DW.ravel()), half_DW.shape[1])
    if view.filters is not None:
        columns = view.filters.inserted_rows().take(pa.array(at_D)).combine_chunks()
        newcomers["columns"] = columns.to_struct_array().combine_chunks() if len(at_D) else None
    gone = np.flatnonzero(~view.live_base.allowed_N)
    newcomers = {name: column for name, column in newcomers.items() if column is not None}
    return {
        "newcomers": pa.table(newcomers),
        "withdrawn": pa.table({"row": gone, "product_id": _named(base_ids, gone)}),
        "changed": _changed(view, base_ids),
    }


def _changed(view: LiveView, base_ids) -> pa.Table:
    """Rows of the base whose columns or value have changed: struct `to` of new values, struct `is` of what has changed."""
    later = {} if view.filters is None else {f"column {name}": one for name, one in view.filters.changed().items()}
    if view.products is not None and view.products.values is not None and view.products.values.later:
        later["value"] = view.products.values.changed()
    of_base = {name: one.below(view.base.rows) for name, one in later.items()}
    of_base = {name: one for name, one in of_base.items() if len(one.row_X)}
    row_X = np.unique(np.concatenate([np.empty(0, np.int64), *(one.row_X for one in of_base.values())]))
    to, changed = {}, {}
    for name, one in of_base.items():
        at_X = np.searchsorted(one.row_X, row_X)
        changed[name] = pa.array(np.append(one.row_X, -1)[at_X] == row_X)
        to[name] = one.values.take(pa.array(at_X, mask=~changed[name].to_numpy(zero_copy_only=False)))
    table = {"row": row_X, "product_id": _named(base_ids, row_X)}
    table |= {f"to {name}": values for name, values in to.items()} | {
        f"is {name}": one for name, one in changed.items()
    }
    return pa.table(table)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isneginf(values))


def _named(base_ids, row_M: np.ndarray) -> pa.Array:
    if base_ids is None:
        return pa.nulls(len(row_M), pa.string())
    return pa.array([base_ids[row].as_py() for row in row_M.tolist()], pa.string())


def view_with(fresh: LiveView, state: dict[str, pa.Table], base_ids, *, nodes: NodesOfView | None = None) -> LiveView:
    """The view that `state_of` was told of, made from one without changes; rows of newcomers are N, N + 1, … `nodes`: as they
    are, where they are known. Raises InputError for a state of another release, or no state."""
    try:
        newcomers, withdrawn, changed = (state[name] for name in ("newcomers", "withdrawn", "changed"))
        view = _with_changed(fresh, changed, base_ids)
        view = _with_newcomers(view, newcomers)
        gone = _rows(withdrawn, fresh, base_ids)
        come = fresh.base.rows + np.flatnonzero(newcomers["live"].to_numpy())
    except (KeyError, pa.ArrowException, ValueError, TypeError) as error:
        raise InputError(f"this is no state of changes to this release ({error!r}); make the snapshot anew") from error
    view = view.with_live(gone, False)
    if nodes is not None:
        return replace(view, nodes=replace(nodes, inserted=view.inserted))
    return followed(view, gone, come)


def _with_changed(view: LiveView, changed: pa.Table, base_ids) -> LiveView:
    row_X, later, products = _rows(changed, view, base_ids), {}, view.products
    for name in [name.removeprefix("to ") for name in changed.column_names if name.startswith("to ")]:
        is_X = changed[f"is {name}"].to_numpy()
        values = changed[f"to {name}"].combine_chunks().filter(pa.array(is_X))
        if name == "value":
            products = products.with_values(row_X[is_X], values.to_pylist())
        else:
            column = name.removeprefix("column ")
            later[column] = Later(row_X[is_X], values.cast(view.filters.index.types[column]))
    filters = view.filters.with_later(later) if later else view.filters
    return replace(view, filters=filters, products=products)


def _with_newcomers(view: LiveView, newcomers: pa.Table) -> LiveView:
    if not newcomers.num_rows:
        return view
    codes_DL = _matrix(newcomers["codes"]).astype(np.int64)
    inserted, filters, products = (
        Inserted.none(view.base).with_products(view.base, codes_DL),
        view.filters,
        view.products,
    )
    if filters is not None:
        struct = newcomers["columns"].combine_chunks()
        columns = {name: struct.field(name) for name in filters.index.types}
        filters = filters.with_rows(filters.rows_of(columns, len(codes_DL)))
    if products is not None:
        products = products.with_newcomers(_newcomers(newcomers, products), stored=_stored(newcomers, products))
    live = Filter.of(newcomers["live"].to_numpy())
    return replace(view, inserted=inserted, live_inserted=live, filters=filters, products=products)


def _newcomers(table: pa.Table, products: Products) -> list[Newcomer]:
    nothing = [None] * table.num_rows
    values = table["value"].to_pylist() if products.values is not None else nothing
    names, titles = table["product_id"].to_pylist(), table["title"].to_pylist()
    return [Newcomer(name, title, None, value) for name, title, value in zip(names, titles, values)]


def _stored(table: pa.Table, products: Products) -> np.ndarray | None:
    return _matrix(table["vector"]) if products.base_vectors is not None else None


def _matrix(lists: pa.ChunkedArray) -> np.ndarray:
    flat = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), -1)


def _rows(table: pa.Table, view: LiveView, base_ids) -> np.ndarray:
    row_M = table["row"].to_numpy()
    if len(row_M) and not 0 <= row_M.min() <= row_M.max() < view.base.rows:
        raise InputError(
            f"the state names row {row_M.max()} of a release of {view.base.rows}; it is of another release"
        )
    if not _named(base_ids, row_M).equals(table["product_id"].combine_chunks()):
        raise InputError("the state names other products than the release has in its rows; it is of another release")
    return row_M
