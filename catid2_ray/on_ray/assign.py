"""Stage 2: codes for the whole catalogue, unique IDs, the trie, and a first report on the IDs' quality.

Three passes over the parts. Encode: actors write codes and last residuals. Resolve: the driver holds one packed integer a
product to see which prefixes collide; only the products of those come together. Write: actors put the final IDs into parts.
The trie and the product table in ID order are what serving maps into memory.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError
from catid2_ray.identifiers.collisions import UniqueIds, assign_unique, colliding_prefixes
from catid2_ray.identifiers.quality import id_quality
from catid2_ray.on_ray import progress
from catid2_ray.on_ray.arrays import fixed_lists, matrix
from catid2_ray.on_ray.catalog import part_specs, read_sample
from catid2_ray.on_ray.parts import map_parts
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.retrieval.trie import Trie

_QUALITY_ROWS = 200_000


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The ids artefact: part-*.parquet of schemas.ids, trie/, products.arrow in ID order."""
    parents = {role: parts[role] for role in ("catalog", "embeddings", "quantizer")}
    return job.produce("ids", job.recipe.ids.identity(), parents, lambda attempt: _assign(job, attempt, parents))


def _assign(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, space, store = job.recipe.ids, job.recipe.quantizer.space, job.store
    specs = part_specs(parents["catalog"])
    shared = {"store": store, "folder": attempt.folder}
    map_parts(
        _EncodePart,
        {**shared, "embeddings": parents["embeddings"].folder, "quantizer": parents["quantizer"], "rows": recipe.encode_rows},
        specs, workers=recipe.workers, label="encoding products", unit="products",
    )  # fmt: skip
    packed_N = np.concatenate(
        [space.pack(matrix(_codes_of(store, attempt, spec, ["codes"])["codes"])) for spec in specs]
    )
    progress.event("encoded", products=len(packed_N), distinct=len(np.unique(packed_N)))
    moves, report = _resolve(job, attempt, parents["quantizer"], specs, packed_N)
    results = map_parts(
        _WriteIds, {**shared, "space": space, "moves": moves}, specs,
        workers=recipe.workers, label="writing IDs", unit="products",
    )  # fmt: skip
    files = [{**result["file"], "part": spec["part"]} for result, spec in zip(results, specs)]
    final_NL, files_of_trie = _write_trie(job, attempt, parents["catalog"], specs)
    store.delete_folder(attempt.name("codes"))
    before, after = len(np.unique(packed_N)), len(np.unique(space.pack(final_NL)))
    total = len(packed_N)
    if after != total:
        raise ArtifactError(
            f"{total - after} of {total} IDs are still shared after de-duplication; nothing was committed"
        )
    metrics = {
        "documents": total,
        "collision_rate_before": (total - before) / total,
        "duplicates_after": total - after,
        "codes_used": [int(len(np.unique(column))) for column in final_NL.T],
        "codes_per_level": list(space.codes_per_level),
        "resolution": report,
        "quality": _quality(job, parents["embeddings"], attempt, files),
    }
    return attempt.commit(
        files + files_of_trie, rows=total, schema=schemas.fingerprint(schemas.ids(space.levels)), metrics=metrics
    )


def _codes_of(store: Store, attempt: Attempt, spec: dict, columns: list[str]) -> pa.Table:
    return store.read_table(attempt.name(f"codes/{spec['file']}"), columns=columns)


def _resolve(
    job: Job, attempt: Attempt, quantizer: Manifest, specs: list[dict], packed_N: np.ndarray
) -> tuple[dict[str, np.ndarray], dict]:
    """New codes of the products in colliding prefixes, as sorted product_ids with codes, moved and cost; and the report."""
    space, store = job.recipe.quantizer.space, job.store
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
        with tempfile.TemporaryDirectory() as cache:
            model = ResidualQuantizer.load(fetch(store, quantizer, Path(cache)))
        # Only a prefix with more products than codes can spill into prefixes that do not collide; then those are taken.
        _, sizes = np.unique(space.prefix_of(packed_N[collides_N], space.levels - 1), return_counts=True)
        occupied = space.unpack(packed_N[~collides_N]) if sizes.max() > space.codes_per_level[-1] else None
        names_N = np.concatenate(names).astype(str)
        progress.event("resolve", prefixes=len(prefixes), products=len(names_N), method=job.recipe.ids.method)
        unique = assign_unique(
            np.concatenate(codes), np.concatenate(residuals), [book.detach().numpy() for book in model.codebooks], names_N,
            occupied=occupied, method=job.recipe.ids.method,
        )  # fmt: skip
    order = np.argsort(names_N)
    moves = {
        "product_id": names_N[order],
        "codes": np.asarray(unique.codes_NL)[order].astype(np.int32),
        "moved": np.asarray(unique.moved_N)[order],
        "cost": np.asarray(unique.cost_N)[order].astype(np.float32),
    }
    return moves, {**unique.report, "method": job.recipe.ids.method}


def _write_trie(job: Job, attempt: Attempt, catalog: Manifest, specs: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """Build the trie over all IDs and write it beside the product table in its order, as Arrow IPC for memory mapping."""
    store, space = job.store, job.recipe.quantizer.space
    final_NL = np.concatenate(
        [matrix(store.read_table(attempt.name(spec["file"]), columns=["codes"])["codes"]) for spec in specs]
    )
    progress.event("trie", products=len(final_NL))
    trie = Trie.build(final_NL, codes_per_level=space.codes_per_level)
    products = pa.concat_tables(
        [store.read_table(catalog.file(spec["file"]), columns=["product_id", "title"]) for spec in specs]
    ).take(pa.array(np.asarray(trie.order_N)))
    with tempfile.TemporaryDirectory() as local:
        folder = Path(local)
        trie.save(folder / "trie")
        with pa.OSFile(str(folder / "products.arrow"), "wb") as sink, pa.ipc.new_file(sink, products.schema) as writer:
            writer.write_table(products.combine_chunks(), max_chunksize=65_536)
        return final_NL, store.upload(folder, attempt.folder)


def _quality(job: Job, embeddings: Manifest, attempt: Attempt, files: list[dict]) -> dict:
    """Figures of identifiers.quality on all products, or on a seeded sample of the largest catalogues."""
    categories = read_sample(
        job.store, embeddings, ["product_id", "category"], rows=_QUALITY_ROWS, seed=job.recipe.seed
    )
    names = pa.concat_tables([job.store.read_table(entry["name"], columns=["product_id", "codes"]) for entry in files])
    rows = pa.compute.index_in(categories["product_id"], names["product_id"].combine_chunks()).to_numpy()
    codes_NL = matrix(names["codes"])[rows]
    return id_quality(codes_NL, matrix(categories["category"]), job.recipe.quantizer.codes_per_level)


class _EncodePart:
    """Actor: embeddings part in, codes part out. One fixed batch shape, so a row's codes do not depend on its neighbours."""

    def __init__(self, *, store: Store, folder: str, embeddings: str, quantizer: Manifest, rows: int):
        self.store, self.folder, self.embeddings, self.rows = store, folder, embeddings, rows
        with tempfile.TemporaryDirectory() as cache:
            self.model = ResidualQuantizer.load(fetch(store, quantizer, Path(cache))).eval()

    def __call__(self, spec: dict) -> dict:
        table = self.store.read_table(f"{self.embeddings}/{spec['file']}", columns=["product_id", "embedding"])
        encoded = self.model.encode_padded(torch.from_numpy(matrix(table["embedding"]).copy()), rows=self.rows)
        out = pa.table(
            {
                "product_id": table["product_id"],
                "codes": fixed_lists(encoded.codes_BL.numpy().astype(np.int32), pa.int32()),
                "residual": fixed_lists(encoded.residual_BZ.numpy(), pa.float32()),
            }
        )
        levels, latent = encoded.codes_BL.shape[1], encoded.residual_BZ.shape[1]
        out = schemas.conform(out, schemas.codes(levels, latent), where=f"codes, part {spec['part']}")
        self.store.write_table(f"{self.folder}/codes/{spec['file']}", out)
        return {"position": spec["position"]}


class _WriteIds:
    """Actor: codes part and the moves in, ids part out."""

    def __init__(self, *, store: Store, folder: str, space: DocidSpace, moves: dict[str, np.ndarray]):
        self.store, self.folder, self.space, self.moves = store, folder, space, moves

    def __call__(self, spec: dict) -> dict:
        table = self.store.read_table(f"{self.folder}/codes/{spec['file']}", columns=["product_id", "codes"])
        codes_NL, names_N = matrix(table["codes"]).copy(), table["product_id"].to_numpy().astype(str)
        moved_N, cost_N = np.zeros(len(codes_NL), bool), np.zeros(len(codes_NL), np.float32)
        known = self.moves["product_id"]
        if len(known):
            place_N = np.minimum(np.searchsorted(known, names_N), len(known) - 1)
            hit_N = known[place_N] == names_N
            codes_NL[hit_N] = self.moves["codes"][place_N[hit_N]]
            moved_N[hit_N], cost_N[hit_N] = self.moves["moved"][place_N[hit_N]], self.moves["cost"][place_N[hit_N]]
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
