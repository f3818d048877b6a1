"""All that a store knows of one product: what the catalogue says, its ID and neighbours, and what became of it since.

Rows of a product lie in one part of every table (a hash of its id), so that all but the neighbours by vector costs one small
file a table; those read every part of the embeddings, one after the other.
"""

import heapq
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import Release, fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.live_log import LiveLog, changes_of
from catid2_ray.on_ray.machine.live_names import Step
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages.catalog import part_of
from catid2_ray.retrieval.trie import Trie


def inspect(store: Store, product_id: str, *, neighbours: int = 5, cache: Path | None = None) -> dict:
    """Ready for JSON: release, product_id, `product` (column → value, None where the current release has no such product), docid
    (as text, or None), `near_id` and `near_vector` (at most `neighbours` each: product_id, title, docid, `shared` first codes, and
    `cosine`), `history` (a dict a release, oldest first: release, created, current, status, docid, since, until, problem) and
    `changes` (to the current release since it was published: number, kind, docid).

    Raises InputError for a product that is in none of these; where its row was set aside, with the reason.
    """
    release = releases.current(store)
    parts = release.manifests(store)
    product, docid = _row(store, parts, product_id), None
    found = {"release": release.name, "product_id": product_id, "product": product}
    near_id, near_vector = [], []
    if product is not None:
        docid = product.pop("docid")
        if neighbours:
            near_id = _near_id(store, parts["ids"], product_id, docid, neighbours, cache or releases.default_cache())
            near_vector = _near_vector(store, parts, product_id, docid, neighbours)
    history = [past for past in (_past(store, name, product_id) for name in _by_age(store)) if past]
    changes = _changes(store, release, product_id)
    if product is None and not changes and not any("status" in past for past in history):
        raise InputError(_unknown(store, release, parts["catalog"], product_id))
    return found | {
        "docid": docid or next((change["docid"] for change in reversed(changes) if change["docid"]), None),
        "near_id": near_id, "near_vector": near_vector, "history": history, "changes": changes,
    }  # fmt: skip


def _part(catalog: Manifest, product_id: str) -> int:
    return int(part_of(pa.chunked_array([[product_id]]), catalog.metrics["parts"])[0])


def _named(store: Store, manifest: Manifest, name: str, product_id: str, columns=None) -> dict | None:
    """The product's row of a file, None where the artefact has no such file or it no such row."""
    if not any(entry["name"] == name for entry in manifest.files):
        return None
    table = store.read_table(manifest.file(name), columns=columns)
    rows = table.filter(pc.equal(table["product_id"], product_id)).to_pylist()
    return rows[0] if rows else None


def _row(store: Store, parts: dict[str, Manifest], product_id: str) -> dict | None:
    """The product's columns in the catalogue, and `docid`."""
    file = f"part-{_part(parts['catalog'], product_id):05d}.parquet"
    said = _named(store, parts["catalog"], file, product_id)
    given = _named(store, parts["ids"], file, product_id, ["product_id", "docid"])
    if said is None or given is None:
        return None
    return {name: value for name, value in said.items() if name != "embedding"} | {"docid": given["docid"]}


def _unknown(store: Store, release: Release, catalog: Manifest, product_id: str) -> str:
    aside = _named(store, catalog, f"rejected/part-{_part(catalog, product_id):05d}.parquet", product_id)
    if aside is not None:
        return f"product {product_id!r} is not in release {release.name}: its row was set aside at the door ({aside['reason']})"
    return (
        f"no product {product_id!r} in release {release.name} of {store.uri}, in one before or among the rows set aside; ids are "
        "compared to the letter, as the catalogue writes them"
    )


def _space(ids: Manifest) -> DocidSpace:
    return DocidSpace(tuple(ids.metrics["codes_per_level"]))


def _shared(one: str, other: str) -> int:
    """How many first codes two IDs, as text, have in common."""
    same = [a == b for a, b in zip(one.split(">")[:-1], other.split(">")[:-1])]
    return same.index(False) if False in same else len(same)


def _near_id(store: Store, ids: Manifest, product_id: str, docid: str, count: int, cache: Path) -> list[dict]:
    """Those that stand next to it in the order of IDs, which share most first codes."""
    folder, space = fetch(store, ids, cache, below=("trie/", "products.arrow")), _space(ids)
    trie = Trie.open(folder / "trie")
    table = pa.ipc.open_file(pa.memory_map(str(folder / "products.arrow"))).read_all()
    start, end = trie.item_range(space.parse(docid))
    row_M = np.arange(max(0, start - count), min(trie.rows, end + count))
    codes_ML = trie.prefixes(trie.levels, trie.row_start[-1].holding(row_M))
    near = [
        {"product_id": one["product_id"], "title": one.get("title"), "docid": space.text(codes_L)}
        for one, codes_L in zip(table.take(pa.array(row_M)).to_pylist(), codes_ML)
        if one["product_id"] != product_id
    ]
    near = [{**one, "shared": _shared(docid, one["docid"])} for one in near]
    return sorted(near, key=lambda one: -one["shared"])[:count]


def _near_vector(store: Store, parts: dict[str, Manifest], product_id: str, docid: str, count: int) -> list[dict]:
    """Those of the highest cosine of their vectors, adapted where the release has an adapter."""
    vectors, columns, best = ProductVectors.of(store, parts), ["product_id", "embedding"], []
    table = vectors.read(f"part-{_part(parts['catalog'], product_id):05d}.parquet", columns)
    own_D = matrix(table["embedding"])[pc.index(table["product_id"], product_id).as_py()]
    for entry in parts["embeddings"].parts():
        table = vectors.read(entry["name"], columns)
        vector_ND = matrix(table["embedding"])
        cosine_N = vector_ND @ own_D / (np.linalg.norm(vector_ND, axis=1) * np.linalg.norm(own_D))
        first_C = np.argsort(-cosine_N, kind="stable")[: count + 1]
        names = table["product_id"].take(pa.array(first_C)).to_pylist()
        best += [pair for pair in zip(cosine_N[first_C].tolist(), names) if pair[1] != product_id]
        best = heapq.nlargest(count, best)
    near = []
    for cosine, name in best:
        row = _row(store, parts, name)
        near.append(
            {"product_id": name, "title": row["title"], "docid": row["docid"], "shared": _shared(docid, row["docid"]),
             "cosine": cosine}
        )  # fmt: skip
    return near


def _by_age(store: Store) -> list[str]:
    """The names of the releases, oldest first; those that cannot be read come first."""
    created = {}
    for entry in store.names("releases"):
        name = entry.removesuffix(".json")
        try:
            created[name] = releases.load(store, name).created
        except ArtifactError:
            created[name] = ""
    return sorted(created, key=lambda name: (created[name], name))


def _past(store: Store, name: str, product_id: str) -> dict | None:
    """What a release did with the product; None where it does not know it."""
    past = {"release": name, "created": "", "current": name == releases.pointer(store)[1]}
    try:
        release = releases.load(store, name)
        parts = release.manifests(store)
    except ArtifactError as error:
        return past | {"problem": str(error)}
    file = f"part-{_part(parts['catalog'], product_id):05d}.parquet"
    row = _named(store, parts["ids"], f"ledger/{file}", product_id)
    if row is None:
        return None
    return past | {
        "created": release.created, "status": row["status"], "docid": _space(parts["ids"]).text(row["codes"]),
        "since": row["since"], "until": row["until"] or None, "number": parts["ids"].metrics["number"],
    }  # fmt: skip


def _changes(store: Store, release: Release, product_id: str) -> list[dict]:
    """The live changes of the release that name the product."""
    steps = (
        (number, Step.of(change))
        for number, record in enumerate(LiveLog(store, release.name).after(0), 1)
        for change in changes_of(record)
    )
    return [
        {"number": number, "kind": step.kind, "docid": dict(zip(step.names, step.docids)).get(product_id)}
        for number, step in steps
        if product_id in (*step.names, *step.changed)
    ]
