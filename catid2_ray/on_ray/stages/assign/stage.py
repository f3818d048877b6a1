"""Stage 2: codes for the whole catalogue, IDs made of them, the ledger, the trie, and a report on the IDs' quality.

Passes over parts of the catalogue and buckets of prefixes: spread yesterday's ledger (where there is one) → encode → resolve
buckets (→ resolve regions, where a prefix has more products than codes) → write parts → order by ID. Products of prefixes
without a collision pass straight through. No step but the last holds more than a part or a bucket, and that one holds what
serving holds.

What makes IDs of codes is the quantizer's `ids`: "unique" resolves collisions, "suffix" and "digits" append an ordinal among
the products of equal codes, "cluster" lets products share an ID. Only unique IDs are followed from release to release.
"""

import functools
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest, digest_of
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError
from catid2_ray.identifiers import ledger
from catid2_ray.identifiers.realign import churn_of, inverse
from catid2_ray.on_ray.job import Job, PreviousRelease
from catid2_ray.on_ray.machine import live_names, progress
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.live_log import LiveLog
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages.assign.buckets import NumberBucket, ResolveBucket, codebooks, resolve_regions
from catid2_ray.on_ray.stages.assign.order import Ordered, near_equal, write_ordered
from catid2_ray.on_ray.stages.assign.quality import describe
from catid2_ray.on_ray.stages.assign.work import EncodePart, SpreadLedger, Work, Yesterday, open_coder
from catid2_ray.on_ray.stages.assign.write import Numbers, WriteIds
from catid2_ray.on_ray.stages.catalog import part_of, part_specs
from catid2_ray.quantizer.coder import Coder


def run(job: Job, parts: dict[str, Manifest], *, keeps: bool = False) -> Manifest:
    """The ids artefact: part-*.parquet of schemas.ids, ledger/part-*.parquet, trie/, products.arrow in ID order.

    `keeps`: products that the release before has, or was given while it served, keep their IDs (append).
    """
    parents = STAGES["ids"].reads(parts)
    history = {"previous": job.previous.parts["ids"]} if job.previous else {}
    quantizer = job.recipe.quantizer
    settings = {**job.recipe.ids.identity(), "ids": quantizer.ids, "by_value": quantizer.tree_categories}
    settings |= {"seed": job.recipe.seed} if quantizer.ids == "cluster" else {}
    settings |= {"append": True} if keeps else {}
    settings |= {"turn_rows": job.recipe.ids.turn_rows} if job.recipe.ids.turn_rows else {}
    served = served_ids(job.store, job.previous, quarantine=job.recipe.ids.id_quarantine) if keeps else None
    if served:
        settings["served"] = digest_of(served.select(["product_id", "codes"]).to_pydict())
    return job.produce(
        "ids",
        settings,
        parents,
        lambda attempt: _assign(job, attempt, parents | history, keeps, served),
        history=history,
    )


def _assign(job: Job, attempt: Attempt, parents: dict[str, Manifest], keeps: bool, served: pa.Table | None) -> Manifest:
    total, watch = parents["catalog"].rows, _Watch()
    coder = open_coder(job.store, parents["quantizer"])
    work = _work(job, attempt, parents, coder, keeps, served)
    if work.yesterday:
        _spread_ledger(job, work, parents, served)
        watch.lap("reading the ledger")
    encoded = _over_parts(EncodePart, {"work": work}, work, "encoding products")
    progress.event("encoded", products=_sum(encoded, "encoded"))
    watch.lap("encoding")
    resolved = _over_buckets(work, coder)
    regions = resolve_regions(work, coder, sorted(home for result in resolved for home in result["overfull"]))
    watch.lap("resolving")

    numbers = _numbers(work.mode, max((result.get("numbers", 1) for result in resolved), default=1))
    space = DocidSpace((*coder.codes_per_level, *numbers.codes_per_level))
    order, shared = near_equal(work, space, -(-total // work.recipe.bucket_rows)), work.mode == "cluster"
    arguments = {"space": space, "numbers": numbers, "moves": work.buckets + len(regions), "shared": shared}
    arguments |= {"work": work, "order": order}
    written = _over_parts(WriteIds, arguments, work, "writing IDs")
    watch.lap("writing")
    ordered = write_ordered(work, attempt, space, order, shared=shared)
    watch.lap("ordering")
    if ordered.duplicates and not shared:
        raise ArtifactError(
            f"{ordered.duplicates} of {total} IDs are still shared after de-duplication; nothing was committed"
        )
    progress.event("describe", ids=total)
    quality = describe(job, coder, work=work, ordered=ordered, space=space, buckets=resolved)
    watch.lap("describing")
    metrics = {
        "documents": total,
        "ids": work.mode,
        "encoded": _sum(encoded, "encoded"),
        # Codes that await an ordinal are no IDs yet, so nothing collides among them.
        "collision_rate_before": 0.0
        if work.mode in ("suffix", "digits")
        else _sum(resolved, "collisions") / max(_sum(encoded, "encoded"), 1),
        "duplicates_after": ordered.duplicates,
        "codes_used": quality["final"]["codes_used"],
        "codes_per_level": list(space.codes_per_level),
        "resolution": _resolution(work, resolved, regions, written),
        "seconds_of_passes": watch.seconds,
        "worker_peak_bytes": {
            name: max(result["peak_bytes"] for result in results)
            for name, results in (("encoding", encoded), ("resolving", resolved + regions), ("writing", written))
        },
        **_history(job, work, written, ordered),
        "quality": quality,
    }
    job.store.delete_folder(attempt.name("exchange"))
    files = [file for result in written for file in result["files"]] + ordered.files
    return attempt.commit(
        files, rows=total, schema=schemas.fingerprint(schemas.ids(space.levels)), metrics=metrics,
        extends=_extends(job.previous.parts) if keeps else {},
    )  # fmt: skip


class _Watch:
    """Seconds of each pass."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _sum(results: list[dict], name: str) -> int:
    return sum(result[name] for result in results)


def _extends(before: dict[str, Manifest]) -> dict[str, list[str]]:
    """Digests of the artefacts whose products and IDs an append keeps: those before it, and what they kept."""
    kept = before["ids"].extends
    return {
        role: [before[role].digest, *kept.get(role, [])]
        for role in ("catalog", "pairs", "embeddings", "ids", "node_vectors", "serving")
        if role in before
    }


def _work(
    job: Job, attempt: Attempt, parents: dict[str, Manifest], coder: Coder, keeps: bool, served: pa.Table | None
) -> Work:
    recipe, catalog, mode = job.recipe.ids, parents["catalog"], job.recipe.quantizer.ids
    yesterday, previous = None, job.previous
    known = previous.parts["ids"].metrics if previous else {}
    if previous and mode == known["ids"] == "unique" and list(coder.codes_per_level) == known["codes_per_level"]:
        yesterday = Yesterday(
            files=len(_groups(previous.parts["ids"], recipe.bucket_rows)) + bool(served), quarantine=recipe.id_quarantine,
            keeps=keeps, unnamed_LK=None if keeps else _unnamed(job, parents["quantizer"]),
        )  # fmt: skip
    if previous and not yesterday:
        progress.event(
            "new_ledger", base=previous.release.name, reason="only unique IDs of the same levels are followed"
        )
    return Work(
        store=job.store, folder=attempt.folder, catalog=catalog.folder, vectors=ProductVectors.of(job.store, parents),
        quantizer=parents["quantizer"], space=DocidSpace(coder.codes_per_level) if coder.codes_per_level else None,
        specs=[{**spec, "position": position} for position, spec in enumerate(part_specs(catalog))],
        recipe=recipe, mode=mode, seed=job.recipe.seed, buckets=-(-catalog.rows // recipe.bucket_rows),
        by_value=job.recipe.quantizer.tree_categories or (mode == "cluster" and recipe.cluster_split == "value"),
        number=previous.number + 1 if previous else 1, yesterday=yesterday,
    )  # fmt: skip


def _unnamed(job: Job, quantizer: Manifest) -> list | None:
    if not quantizer.named("rename.json"):
        return None
    return inverse(json.loads(job.store.read(quantizer.file("rename.json"))))


def _groups(ids: Manifest, rows: int) -> list[list[dict]]:
    """The files of a ledger, as many together as one worker may hold."""
    groups: list[list[dict]] = []
    for entry in ids.named("ledger/"):
        if not groups or sum(other["rows"] for other in groups[-1]) + entry["rows"] > rows:
            groups.append([])
        groups[-1].append(entry)
    return groups


def _spread_ledger(job: Job, work: Work, parents: dict[str, Manifest], served: pa.Table | None) -> None:
    previous = parents["previous"]
    place = functools.partial(part_of, parts=parents["catalog"].metrics["parts"])
    specs = [
        {"files": [previous.file(entry["name"]) for entry in group], "rows": sum(entry["rows"] for entry in group)}
        for group in _groups(previous, work.recipe.bucket_rows)
    ]
    if served:
        name = f"{work.folder}/exchange/served.parquet"
        specs.append({"files": [name], "rows": work.store.write_table(name, served)["rows"]})
    map_parts(
        SpreadLedger, {"work": work, "part_of": place}, specs, workers=work.recipe.workers, label="reading the ledger",
        unit="products",
    )  # fmt: skip


def _over_parts(handler: type, arguments: dict, work: Work, label: str) -> list[dict]:
    return map_parts(handler, arguments, work.specs, workers=work.recipe.workers, label=label, unit="products")


def _over_buckets(work: Work, coder: Coder) -> list[dict]:
    rows = sum(spec["rows"] for spec in work.specs)
    specs = [{"rows": rows // work.buckets} for _ in range(work.buckets)]
    handler, arguments = NumberBucket, {"work": work}
    if work.mode == "unique":
        handler, arguments = ResolveBucket, {"work": work, "codebooks": codebooks(coder)}
    progress.event("resolve", buckets=work.buckets, mode=work.mode, method=work.recipe.method)
    return map_parts(
        handler, arguments, specs, workers=work.recipe.workers, label="resolving collisions", unit="products"
    )  # fmt: skip


def _numbers(mode: str, largest: int) -> Numbers:
    """The tokens after the coder's codes: none, one with a code for every number, or decimal digits."""
    if mode == "digits":
        return Numbers((10,) * len(str(largest - 1)))
    return Numbers((largest,)) if mode == "suffix" or largest > 1 else Numbers()


def _resolution(work: Work, resolved: list[dict], regions: list[dict], written: list[dict]) -> dict:
    """The buckets' reports as one: counts are added up, of sizes the largest counts."""
    merged: dict = {}
    for name, value in [item for result in resolved for item in result["report"].items()]:
        if isinstance(value, str):
            merged[name] = value
        else:
            known, most = merged.get(name, 0), name.startswith("largest") or name == "t_max"
            merged[name] = max(known, value) if most else known + value
    merged |= {"method": work.recipe.method} if work.mode == "unique" else {}
    return merged | {
        "moved": _sum(written, "moved"),
        "added_cost": float(sum(result["cost"] for result in written)),
        "overflowed": _sum(regions, "overflowed"),
        "buckets": work.buckets,
    }


def _history(job: Job, work: Work, written: list[dict], ordered: Ordered) -> dict:
    """Number of the release, products by status, and what changed since the release before."""
    counts = {name: sum(result["ledger"][name] for result in written) for name in written[0]["ledger"]}
    history = {
        "number": work.number,
        "base": job.previous.release.name if job.previous else None,
        "ledger": counts,
        "churn": None,
    }
    if work.yesterday:
        sides = written[0]["churn"]
        addresses = {"addresses": ordered.addresses, "addresses_reused": ordered.addresses_reused}
        history["churn"] = {
            side: churn_of([result["churn"][side] for result in written], **addresses) for side in sides
        }
        if "before" in sides:
            for name in ("addresses", "addresses_reused", "address_reuse"):
                del history["churn"]["before"][name]
    return history


def served_ids(store: Store, previous: PreviousRelease, *, quarantine: int) -> pa.Table | None:
    """Rows of a ledger, by product_id; None where there are none.

    The ledger of `previous` comes first: who is in it keeps what it says there, and an ID that it reserves is not given twice.
    It is read file by file, so that memory is that of one file and of the products that live changes name. Cost 0: what such
    an ID added was not kept.
    """
    steps, ids = LiveLog(store, previous.release.name).steps(), previous.parts["ids"]
    if not any(step.docids for step in steps):
        return None
    space, number = DocidSpace(tuple(ids.metrics["codes_per_level"])), previous.number
    mentioned = pa.array(sorted({name for step in steps for name in step.names}), pa.string())
    docids = sorted({docid for step in steps for docid in step.docids})
    packed_M = space.pack(np.array([space.parse(docid) for docid in docids], np.int64))
    base, known_names, reserved = {}, set(), set()
    for entry in ids.named("ledger/"):
        known = store.read_table(ids.file(entry["name"]), columns=["product_id", "codes", "status", "until"])
        packed_N = space.pack(matrix(known["codes"]).astype(np.int64))
        named = pc.is_in(known["product_id"], mentioned).to_numpy()
        of_interest = np.flatnonzero(named | np.isin(packed_N, packed_M))
        for row in known.take(pa.array(of_interest)).to_pylist():
            docid, live = space.text(row["codes"]), row["status"] != "retired"
            known_names.add(row["product_id"])
            if live:
                base[row["product_id"]] = docid
            if live or row["until"] > number + 1:
                reserved.add(docid)
    given = live_names.given(steps, base)
    free = {name: docid for name, docid in given.items() if name not in known_names and docid not in reserved}
    if not free:
        return None
    names, count = pa.array(list(free), pa.string()), len(free)
    codes_ML = np.array([space.parse(docid) for docid in free.values()], np.int32)
    return pa.table(
        [
            names, fixed_lists(codes_ML, pa.int32()),
            pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), ["retired"]), np.full(count, number, np.int32),
            np.full(count, number + 1 + max(1, quarantine), np.int32), np.zeros(count, np.float32),
        ],
        schema=ledger.schema(space.levels),
    )  # fmt: skip
