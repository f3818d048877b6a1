"""Stage 2: codes for the whole catalogue, IDs made of them, the trie, and a report on the IDs' quality.

Three passes over the parts. Encode: actors write codes and last residuals. Resolve: the driver holds one packed integer a
product to see which prefixes collide; only the products of those come together. Write: actors put the final IDs into parts.
The trie and the product table in ID order are what serving maps into memory; while they and the report are made, the driver
holds the codes of the whole catalogue, and with ordinals all product ids.

What makes IDs of codes is the quantizer's `ids`: "unique" resolves collisions, "suffix" and "digits" append an ordinal
among the products of equal codes, "cluster" lets products share an ID.
"""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError
from catid2_ray.identifiers.clusters import split_clusters
from catid2_ray.identifiers.collisions import UniqueIds, assign_unique, colliding_prefixes
from catid2_ray.identifiers.suffix import ordinal_suffix
from catid2_ray.on_ray import progress
from catid2_ray.on_ray.arrays import fixed_lists, matrix
from catid2_ray.on_ray.catalog import part_specs
from catid2_ray.on_ray.id_quality import describe, row_hashes
from catid2_ray.on_ray.parts import map_parts
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.quantizer.coder import Coder, encode, load_coder
from catid2_ray.retrieval.trie import Trie


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The ids artefact: part-*.parquet of schemas.ids, trie/, products.arrow in ID order."""
    parents = {role: parts[role] for role in ("catalog", "embeddings", "quantizer")}
    quantizer = job.recipe.quantizer
    settings = {**job.recipe.ids.identity(), "ids": quantizer.ids, "by_value": quantizer.tree_categories}
    settings |= {"seed": job.recipe.seed} if quantizer.ids == "cluster" else {}
    return job.produce("ids", settings, parents, lambda attempt: _assign(job, attempt, parents))


class _Made(NamedTuple):
    """What the driver hands to the writing actors: moves by product_id, or ordinal tokens in the order of the parts."""

    space: DocidSpace
    moves: dict[str, np.ndarray]
    suffix_NS: np.ndarray
    report: dict


def _assign(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, mode, store = job.recipe.ids, job.recipe.quantizer.ids, job.store
    specs, started = _with_starts(part_specs(parents["catalog"])), time.monotonic()
    coder = _open_coder(store, parents["quantizer"])
    shared = {"store": store, "folder": attempt.folder}
    map_parts(
        _EncodePart,
        {**shared, "embeddings": parents["embeddings"].folder, "quantizer": parents["quantizer"], "rows": recipe.encode_rows},
        specs, workers=recipe.workers, label="encoding products", unit="products",
    )  # fmt: skip
    levels = len(coder.codes_per_level)
    raw = pa.concat_tables([_codes_of(store, attempt, spec, ["twin", *["codes"][:levels]]) for spec in specs])
    raw_NL = matrix(raw["codes"]) if levels else np.empty((raw.num_rows, 0), np.int32)
    prefix_N = DocidSpace(coder.codes_per_level).pack(raw_NL) if levels else np.zeros(raw.num_rows, np.int64)
    progress.event("encoded", products=len(prefix_N), distinct=len(np.unique(prefix_N)))
    resolving = time.monotonic()
    if mode == "unique":
        made = _resolve(job, attempt, coder, specs, prefix_N)
    elif mode == "cluster":
        made = _split_clusters(job, attempt, parents["catalog"], coder, specs, prefix_N)
    else:
        made = _append_ordinals(job, parents["catalog"], coder, specs, prefix_N)
    resolved = time.monotonic()
    results = map_parts(
        _WriteIds, {**shared, "space": made.space, "moves": made.moves, "suffix_NS": made.suffix_NS}, specs,
        workers=recipe.workers, label="writing IDs", unit="products",
    )  # fmt: skip
    files = [{**result["file"], "part": spec["part"]} for result, spec in zip(results, specs)]
    written = pa.concat_tables([store.read_table(attempt.name(spec["file"]), columns=_WRITTEN) for spec in specs])
    final_NL = matrix(written["codes"])
    files_of_trie = _write_trie(job, attempt, parents["catalog"], specs, final_NL, made.space, shared=mode == "cluster")
    store.delete_folder(attempt.name("codes"))
    total, after = len(final_NL), len(np.unique(made.space.pack(final_NL)))
    if after != total and mode != "cluster":
        raise ArtifactError(
            f"{total - after} of {total} IDs are still shared after de-duplication; nothing was committed"
        )
    # Codes that await an ordinal are no IDs yet, so nothing collides among them.
    before = after if mode in ("suffix", "digits") else len(np.unique(prefix_N))
    progress.event("describe", ids=total)
    metrics = {
        "documents": total,
        "ids": mode,
        "collision_rate_before": (total - before) / total,
        "duplicates_after": total - after,
        "codes_used": [int(len(np.unique(column))) for column in final_NL.T],
        "codes_per_level": list(made.space.codes_per_level),
        "resolution": made.report,
        "seconds_resolving": round(resolved - resolving, 3),
        "seconds_encoding": round(resolving - started, 3),
        "quality": describe(
            job, parents["embeddings"], coder, specs=specs, raw_NL=raw_NL if mode in ("unique", "cluster") else final_NL,
            final_NL=final_NL, space=made.space, twin_N=raw["twin"].to_numpy(), moved_N=written["moved"].to_numpy(),
            cost_N=written["cost"].to_numpy(),
        ),
    }  # fmt: skip
    return attempt.commit(
        files + files_of_trie, rows=total, schema=schemas.fingerprint(schemas.ids(made.space.levels)), metrics=metrics
    )


_WRITTEN = ["codes", "moved", "cost"]


def _with_starts(specs: list[dict]) -> list[dict]:
    """The parts with the number of rows before each, which is a row's place in arrays over the whole catalogue."""
    starts = np.cumsum([0, *(spec["rows"] for spec in specs)]).tolist()
    return [{**spec, "start": start} for spec, start in zip(specs, starts)]


def _open_coder(store: Store, quantizer: Manifest) -> Coder:
    with tempfile.TemporaryDirectory() as cache:
        return load_coder(fetch(store, quantizer, Path(cache)))


def _no_moves(levels: int) -> dict[str, np.ndarray]:
    return {
        "product_id": np.empty(0, dtype=str), "codes": np.empty((0, levels), np.int32), "moved": np.empty(0, bool),
        "cost": np.empty(0, np.float32),
    }  # fmt: skip


def _split_clusters(
    job: Job, attempt: Attempt, catalog: Manifest, coder: Coder, specs: list[dict], prefix_N: np.ndarray
) -> _Made:
    """Products share IDs, but at most ids.cluster_max of them: one more token for the groups of the larger clusters."""
    recipe, space = job.recipe.ids, DocidSpace(coder.codes_per_level)
    made = _Made(space, _no_moves(space.levels), np.empty((len(prefix_N), 0), np.int32), {"groups": 1})
    _, of_N, size = np.unique(prefix_N, return_inverse=True, return_counts=True)
    large_N = size[of_N] > (recipe.cluster_max or len(prefix_N))
    if not large_N.any():
        return made
    residuals, names, values = [], [], []
    for spec in specs:
        mask_N = large_N[spec["start"] : spec["start"] + spec["rows"]]
        if mask_N.any():
            mask = pa.array(mask_N)
            table = _codes_of(job.store, attempt, spec, ["product_id", "residual"]).filter(mask)
            residuals.append(matrix(table["residual"]))
            names.append(table["product_id"].to_numpy().astype(str))
            value = job.store.read_table(catalog.file(spec["file"]), columns=["value"])["value"]
            values.append(value.filter(mask).to_numpy())
    groups = split_clusters(
        prefix_N[large_N], np.concatenate(residuals), np.concatenate(names), t_max=recipe.cluster_max,
        method=recipe.cluster_split, value_N=np.concatenate(values) if recipe.cluster_split == "value" else None,
        seed=job.recipe.seed,
    )  # fmt: skip
    suffix_NS = np.zeros((len(prefix_N), 1), np.int32)
    suffix_NS[large_N, 0] = groups.group_N
    space = DocidSpace((*coder.codes_per_level, groups.groups))
    return made._replace(space=space, suffix_NS=suffix_NS, report=groups.report)


def _append_ordinals(job: Job, catalog: Manifest, coder: Coder, specs: list[dict], prefix_N: np.ndarray) -> _Made:
    """One more token, or its decimal digits, that tells apart the products of equal codes: by value where the catalogue
    has one (Hi-Gen's efficiency), then by product_id."""
    columns = ["product_id", "value"] if job.recipe.quantizer.tree_categories else ["product_id"]
    table = pa.concat_tables([job.store.read_table(catalog.file(spec["file"]), columns=columns) for spec in specs])
    value_N = table["value"].to_numpy() if "value" in columns else None
    suffix = ordinal_suffix(
        prefix_N, table["product_id"].to_numpy().astype(str), priority_N=value_N,
        base=10 if job.recipe.quantizer.ids == "digits" else None,
    )  # fmt: skip
    space = DocidSpace((*coder.codes_per_level, *suffix.codes_per_level))
    size = np.unique(prefix_N, return_counts=True)[1]
    report = {"groups": len(size), "largest_group": int(size.max())}
    return _Made(space, _no_moves(len(coder.codes_per_level)), suffix.codes_NS.astype(np.int32), report)


def _codes_of(store: Store, attempt: Attempt, spec: dict, columns: list[str]) -> pa.Table:
    return store.read_table(attempt.name(f"codes/{spec['file']}"), columns=columns)


def _resolve(job: Job, attempt: Attempt, coder: Coder, specs: list[dict], packed_N: np.ndarray) -> _Made:
    """New codes of the products in colliding prefixes, as sorted product_ids with codes, moved and cost; and the report."""
    space, store = DocidSpace(coder.codes_per_level), job.store
    prefixes = colliding_prefixes(packed_N, space)
    collides_N = np.isin(space.prefix_of(packed_N, space.levels - 1), prefixes)
    codes, residuals, names, start = [], [], [], 0
    for spec in specs:
        mask = collides_N[start : start + spec["rows"]]
        start += spec["rows"]
        if mask.any():
            table = _codes_of(store, attempt, spec, ["product_id", "codes", "residual"]).filter(pa.array(mask))
            codes.append(matrix(table["codes"]))
            residuals.append(matrix(table["residual"]))
            names.append(table["product_id"].to_numpy())
    if not codes:
        empty = np.empty((0, space.levels), np.int32)
        unique = UniqueIds(empty, np.empty(0, bool), np.empty(0, np.float32), {"colliding_prefixes": 0, "moved": 0})
        names_N = np.empty(0, dtype=str)
    else:
        # Only a prefix with more products than codes can spill into prefixes that do not collide; then those are taken.
        _, sizes = np.unique(space.prefix_of(packed_N[collides_N], space.levels - 1), return_counts=True)
        occupied = space.unpack(packed_N[~collides_N]) if sizes.max() > space.codes_per_level[-1] else None
        names_N = np.concatenate(names).astype(str)
        progress.event("resolve", prefixes=len(prefixes), products=len(names_N), method=job.recipe.ids.method)
        unique = assign_unique(
            np.concatenate(codes), np.concatenate(residuals), [book.detach().numpy() for book in coder.codebooks], names_N,
            occupied=occupied, method=job.recipe.ids.method,
        )  # fmt: skip
    order = np.argsort(names_N)
    moves = {
        "product_id": names_N[order],
        "codes": np.asarray(unique.codes_NL)[order].astype(np.int32),
        "moved": np.asarray(unique.moved_N)[order],
        "cost": np.asarray(unique.cost_N)[order].astype(np.float32),
    }
    return _Made(space, moves, space.unpack(packed_N)[:, :0], {**unique.report, "method": job.recipe.ids.method})


def _write_trie(
    job: Job, attempt: Attempt, catalog: Manifest, specs: list[dict], final_NL: np.ndarray, space: DocidSpace, *,
    shared: bool,
) -> list[dict]:  # fmt: skip
    """Build the trie over all IDs and write it beside the product table in its order, as Arrow IPC for memory mapping."""
    store = job.store
    progress.event("trie", products=len(final_NL))
    trie = Trie.build(final_NL, codes_per_level=space.codes_per_level, shared=shared)
    products = pa.concat_tables(
        [store.read_table(catalog.file(spec["file"]), columns=["product_id", "title"]) for spec in specs]
    ).take(pa.array(np.asarray(trie.order_N)))
    with tempfile.TemporaryDirectory() as local:
        folder = Path(local)
        trie.save(folder / "trie")
        with pa.OSFile(str(folder / "products.arrow"), "wb") as sink, pa.ipc.new_file(sink, products.schema) as writer:
            writer.write_table(products.combine_chunks(), max_chunksize=65_536)
        return store.upload(folder, attempt.folder)


class _EncodePart:
    """Actor: embeddings part in, codes part out. One fixed batch shape, so a row's codes do not depend on its neighbours."""

    def __init__(self, *, store: Store, folder: str, embeddings: str, quantizer: Manifest, rows: int):
        self.store, self.folder, self.embeddings, self.rows = store, folder, embeddings, rows
        self.coder = _open_coder(store, quantizer)

    def __call__(self, spec: dict) -> dict:
        columns = ["product_id", "embedding", "category"]
        table = self.store.read_table(f"{self.embeddings}/{spec['file']}", columns=columns)
        embedding_ND = matrix(table["embedding"])
        category_NH = torch.from_numpy(matrix(table["category"]).astype(np.int64))
        encoded = encode(self.coder, torch.from_numpy(embedding_ND.copy()), category_NH, rows=self.rows)
        out = {"product_id": table["product_id"], "twin": row_hashes(embedding_ND)}
        levels, latent = encoded.codes_BL.shape[1], encoded.residual_BZ.shape[1]
        if levels:
            out["codes"] = fixed_lists(encoded.codes_BL.numpy().astype(np.int32), pa.int32())
        if latent:
            out["residual"] = fixed_lists(encoded.residual_BZ.numpy(), pa.float32())
        out = schemas.conform(pa.table(out), schemas.codes(levels, latent), where=f"codes, part {spec['part']}")
        self.store.write_table(f"{self.folder}/codes/{spec['file']}", out)
        return {"position": spec["position"]}


class _WriteIds:
    """Actor: codes part and the moves in, ids part out."""

    def __init__(
        self, *, store: Store, folder: str, space: DocidSpace, moves: dict[str, np.ndarray], suffix_NS: np.ndarray
    ):
        self.store, self.folder, self.space, self.moves, self.suffix_NS = store, folder, space, moves, suffix_NS

    def __call__(self, spec: dict) -> dict:
        levels = self.space.levels - self.suffix_NS.shape[1]
        columns = ["product_id", *["codes"][:levels]]
        table = self.store.read_table(f"{self.folder}/codes/{spec['file']}", columns=columns)
        codes_NL = matrix(table["codes"]).copy() if levels else np.empty((table.num_rows, 0), np.int32)
        names_N = table["product_id"].to_numpy().astype(str)
        moved_N, cost_N = np.zeros(len(codes_NL), bool), np.zeros(len(codes_NL), np.float32)
        known = self.moves["product_id"]
        if len(known):
            place_N = np.minimum(np.searchsorted(known, names_N), len(known) - 1)
            hit_N = known[place_N] == names_N
            codes_NL[hit_N] = self.moves["codes"][place_N[hit_N]]
            moved_N[hit_N], cost_N[hit_N] = self.moves["moved"][place_N[hit_N]], self.moves["cost"][place_N[hit_N]]
        codes_NL = np.hstack([codes_NL, self.suffix_NS[spec["start"] : spec["start"] + len(codes_NL)]])
        out = pa.table(
            {
                "product_id": table["product_id"],
                "codes": fixed_lists(codes_NL, pa.int32()),
                "docid": [self.space.text(codes_L) for codes_L in codes_NL],
                "moved": moved_N,
                "cost": cost_N,
            }
        )
        out = schemas.conform(out, schemas.ids(self.space.levels), where=f"ids, part {spec['part']}")
        return {"position": spec["position"], "file": self.store.write_table(f"{self.folder}/{spec['file']}", out)}
