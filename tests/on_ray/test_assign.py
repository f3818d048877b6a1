"""Stage 2 over parts and buckets equals one call on the whole catalogue, whatever is cut or appended. Workers of Ray, and their
deaths: test_assign_workers.py.

Codes come from residual k-means on given embeddings, so nothing is trained; families of near-equal products overflow their
prefixes.
"""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError
from catid2_ray.identifiers.collisions import assign_unique
from catid2_ray.identifiers.suffixes import ordinal_suffix, split_clusters
from catid2_ray.on_ray.job import Job, PreviousRelease
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.live_log import LiveLog
from catid2_ray.on_ray.pipeline import chain
from catid2_ray.on_ray.stages import realign
from catid2_ray.on_ray.stages.assign import stage
from catid2_ray.on_ray.stages.assign.buckets import codebooks
from catid2_ray.on_ray.stages.assign.work import open_coder
from catid2_ray.quantizer.coder import encode

WIDTH, CODES = 8, (16, 16, 32)


def products(count: int, seed: int = 0) -> pa.Table:
    """`count` products of which a third belong to families of 40: more than a prefix has codes; some are exact copies."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, WIDTH)).astype(np.float32)
    family = rng.permutation(count)[: count // 3]
    vectors[family] = vectors[family[np.arange(len(family)) // 40 * 40]] + rng.normal(size=(len(family), WIDTH)) * 0.01
    vectors[family[1::9]] = vectors[family[0::9][: len(family[1::9])]]
    names = [f"sku-{number:05d}" for number in rng.permutation(100_000)[:count]]
    return pa.table(
        {
            "product_id": names, "title": [f"thing {name}" for name in names],
            "embedding": fixed_lists(vectors, pa.float32()), "value": rng.integers(0, 50, count).astype(np.float32),
        }
    )  # fmt: skip


def recipe_of(folder, *, rows_per_part=700, kind="rq_kmeans", ids=(), **quantizer) -> Recipe:
    return Recipe.build(
        {
            "store": f"{folder}/store",
            "catalog": {"root": f"{folder}/data", "rows_per_part": rows_per_part},
            "embedding": {"workers": 1},
            "quantizer": {"kind": kind, "codes_per_level": CODES, "kmeans_sample": 500, "balanced": False, **quantizer},
            "ids": {"bucket_rows": 1000, "encode_rows": 64, "workers": 1, **dict(ids)},
        }
    )


def write_catalogue(folder, table: pa.Table) -> None:
    (folder / "data").mkdir(exist_ok=True)
    pq.write_table(table, folder / "data" / "products.parquet")


def parts_of(recipe: Recipe, last: str = "ids") -> dict:
    job = Job(recipe=recipe, store=Store(recipe.store), peak=cluster.PeakMemory())
    return chain(job, last)


def assigned(recipe: Recipe, parts: dict, base: PreviousRelease | None = None, *, keeps=False):
    """The ids artefact of these parts, made anew."""
    job = Job(recipe=recipe, store=Store(recipe.store), peak=cluster.PeakMemory(), previous=base)
    shutil.rmtree(f"{recipe.store}/artifacts/ids", ignore_errors=True)
    return stage.run(job, {name: parts[name] for name in ("catalog", "embeddings", "quantizer")}, keeps=keeps)


def table_of(recipe: Recipe, manifest, prefix="part-") -> pa.Table:
    store = Store(recipe.store)
    found = pa.concat_tables([store.read_table(manifest.file(entry["name"])) for entry in manifest.named(prefix)])
    return found.sort_by("product_id")


def ids_of(recipe: Recipe, manifest) -> dict[str, tuple]:
    table = table_of(recipe, manifest)
    return dict(zip(table["product_id"].to_pylist(), map(tuple, matrix(table["codes"]).tolist())))


def ledger_of(recipe: Recipe, manifest) -> pa.Table:
    return table_of(recipe, manifest, "ledger/")


def coded(recipe: Recipe, parts: dict):
    """Names, codes and last residuals of the whole catalogue, encoded at once, and the codebooks."""
    table = table_of(recipe, parts["embeddings"])
    coder = open_coder(Store(recipe.store), parts["quantizer"])
    embedding, category = torch.from_numpy(matrix(table["embedding"]).copy()), torch.zeros(table.num_rows, 0).long()
    found = encode(coder, embedding, category, rows=recipe.ids.encode_rows)
    names = table["product_id"].to_numpy().astype(str)
    return names, found.codes_BL.numpy(), found.residual_BZ.numpy(), codebooks(coder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, no_ray):
    """3,000 products with codes."""
    folder = tmp_path_factory.mktemp("assign")
    write_catalogue(folder, products(3000))
    recipe = recipe_of(folder)
    return folder, recipe, parts_of(recipe, "quantizer")


def test_parts_and_buckets_give_what_one_call_gives(world):
    _, recipe, parts = world
    names, codes_NL, residual_NZ, books = coded(recipe, parts)
    whole = assign_unique(codes_NL, residual_NZ, books, names, method="exact")
    manifest = assigned(recipe, parts)
    assert ids_of(recipe, manifest) == dict(zip(names.tolist(), map(tuple, whole.codes_NL.tolist())))
    table, report = table_of(recipe, manifest), manifest.metrics["resolution"]
    np.testing.assert_array_equal(table["moved"].to_numpy(), whole.moved_N)
    np.testing.assert_allclose(table["cost"].to_numpy(), whole.cost_N.astype(np.float32))
    assert report["moved"] == whole.report["moved"] and report["overflowed"] == whole.report["overflowed"] > 0
    assert report["colliding_prefixes"] == whole.report["colliding_prefixes"] and report["method"] == "exact"
    assert report["largest_prefix"] == whole.report["largest_prefix"] and report["buckets"] == 3
    assert manifest.metrics["collision_rate_before"] == pytest.approx(whole.report["collision_rate_before"])
    assert manifest.metrics["duplicates_after"] == 0 and manifest.metrics["number"] == 1
    assert min(manifest.metrics["worker_peak_bytes"].values()) > 2**20
    space = DocidSpace(CODES)
    assert [space.parse(text) for text in table["docid"].to_pylist()] == [tuple(row) for row in whole.codes_NL.tolist()]
    assert not (Store(recipe.store).names(f"{manifest.folder}/exchange"))
    ledger = table_of(recipe, manifest, "ledger/")
    assert set(ledger["status"].to_pylist()) == {"new"} and set(ledger["since"].to_pylist()) == {1}


@pytest.mark.parametrize("bucket_rows", [1_000_000, 1_500])
def test_buckets_change_no_byte(world, bucket_rows):
    _, recipe, parts = world
    other = recipe.model_copy(update={"ids": recipe.ids.model_copy(update={"bucket_rows": bucket_rows})})
    assert assigned(other, parts).digest == assigned(recipe, parts).digest


def test_other_parts_give_the_same_ids(world, tmp_path):
    folder, recipe, parts = world
    shutil.copytree(folder / "data", tmp_path / "data")
    table = pq.read_table(tmp_path / "data" / "products.parquet")
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows)))
    pq.write_table(shuffled, tmp_path / "data" / "products.parquet")
    other = recipe_of(tmp_path, rows_per_part=2000)
    found = parts_of(other, "embeddings") | {"quantizer": parts["quantizer"]}
    shutil.copytree(f"{recipe.store}/artifacts/quantizer", f"{other.store}/artifacts/quantizer")
    assert ids_of(other, assigned(other, found)) == ids_of(recipe, assigned(recipe, parts))


def test_a_region_larger_than_a_worker_may_hold_is_refused_or_placed_in_turns(world, tmp_path):
    crowded = products(1100, seed=5)
    vectors = np.ones((1100, WIDTH), np.float32) + np.arange(1100, dtype=np.float32)[:, None] * 1e-6
    crowded = crowded.set_column(2, "embedding", fixed_lists(vectors, pa.float32()))
    write_catalogue(tmp_path, crowded)
    recipe = recipe_of(tmp_path, refit=False)
    parts = parts_of(recipe, "embeddings")
    shutil.copytree(f"{world[1].store}/artifacts/quantizer", f"{recipe.store}/artifacts/quantizer")
    parts["quantizer"] = world[2]["quantizer"]
    refused = r"1100 products whose IDs begin with \[.*\] .*ids.bucket_rows 1000\): set ids.turn_rows"
    with pytest.raises(CapacityError, match=refused):
        assigned(recipe, parts)
    found = []
    for bucket_rows, rows_per_part in ((1000, 700), (5000, 200)):
        other = recipe_of(
            tmp_path, refit=False, rows_per_part=rows_per_part, ids={"turn_rows": 1000, "bucket_rows": bucket_rows}
        )
        manifest = assigned(other, parts_of(other, "embeddings") | {"quantizer": world[2]["quantizer"]})
        found.append(ids_of(other, manifest))
        assert len(set(found[-1].values())) == 1100 and manifest.metrics["resolution"]["overflowed"] > 0
    assert found[0] == found[1]


def test_other_modes_equal_one_call(world):
    folder, recipe, parts = world
    names, codes_NL, residual_NZ, _ = coded(recipe, parts)
    packed_N = DocidSpace(CODES).pack(codes_NL)
    value_N = table_of(recipe, parts["catalog"])["value"].to_numpy()
    for mode, split in [
        ("suffix", None),
        ("digits", None),
        *(("cluster", way) for way in ("kmeans", "value", "random")),
    ]:
        other = recipe_of(folder, ids={"cluster_max": 5, "cluster_split": split} if split else {})
        other = other.model_copy(update={"quantizer": other.quantizer.model_copy(update={"ids": mode})})
        if mode == "cluster":
            size = np.unique(packed_N, return_inverse=True, return_counts=True)
            large_N = size[2][size[1]] > 5
            number_N = np.zeros(len(names), np.int64)
            found = split_clusters(
                packed_N[large_N], residual_NZ[large_N], names[large_N], t_max=5, method=split, value_N=value_N[large_N],
                seed=recipe.seed,
            )  # fmt: skip
            number_N[large_N] = found.group_N
            expected = np.column_stack([codes_NL, number_N])
        else:
            suffix = ordinal_suffix(packed_N, names, base=10 if mode == "digits" else None)
            expected = np.hstack([codes_NL, suffix.codes_NS])
        manifest = assigned(other, parts)
        assert ids_of(other, manifest) == dict(zip(names.tolist(), map(tuple, expected.tolist())))
        assert manifest.metrics["codes_per_level"][:3] == list(CODES)


def base_on(recipe: Recipe, parts: dict, ids) -> PreviousRelease:
    """A release of these parts, as if it had been published; its artefact of IDs is kept out of the way of the next."""
    store = Store(recipe.store)
    kept = dataclasses.replace(ids, folder=f"kept/{ids.digest[:8]}")
    if not store.exists(kept.folder):
        shutil.copytree(store.path(ids.folder), store.path(kept.folder))
    return PreviousRelease(Release(name=f"r-{ids.digest[:6]}", parts={}), {**parts, "ids": kept})


def grown(folder, tmp_path, *, drop: int, add: int, seed: int):
    """The catalogue of `folder` without its first `drop` products and with `add` new ones, in parts of another number."""
    table = pq.read_table(folder / "data" / "products.parquet")
    fresh = products(add, seed=seed)
    renamed = pa.array([f"new-{seed}-{number:04d}" for number in range(add)])
    fresh = fresh.set_column(0, "product_id", renamed)
    write_catalogue(tmp_path, pa.concat_tables([table.slice(drop), fresh]))
    return table["product_id"].to_pylist()[:drop], renamed.to_pylist()


def test_append_moves_no_id_and_the_ledger_goes_on(world, tmp_path):
    folder, recipe, parts = world
    first = assigned(recipe, parts)
    before, base = ids_of(recipe, first), base_on(recipe, parts, first)
    gone, new = grown(folder, tmp_path, drop=50, add=300, seed=9)
    later = recipe_of(tmp_path, rows_per_part=400)
    later = later.model_copy(update={"store": recipe.store})
    found = parts_of(later, "embeddings") | {"quantizer": parts["quantizer"]}
    second = assigned(later, found, base, keeps=True)
    after = ids_of(later, second)
    assert set(after) == (set(before) - set(gone)) | set(new)
    assert all(after[name] == before[name] for name in set(before) - set(gone))
    # Nor is the ID of a product that left given away: it stays in quarantine.
    assert len(set(after.values())) == len(after) and not {before[name] for name in gone} & set(after.values())
    assert second.metrics["ledger"] == {"kept": 2950, "new": 300, "moved": 0, "retired": 50, "live": 3250}
    assert second.metrics["encoded"] == 300 and second.metrics["number"] == 2
    assert second.metrics["churn"]["after"]["prefix_churn"] == [0.0, 0.0, 0.0]
    assert second.metrics["churn"]["after"]["addresses_reused"] == 0
    assert second.extends["ids"] == [first.digest] and second.parents["previous"] == first.digest
    # One call with everything published as occupied gives the same.
    names, codes_NL, residual_NZ, books = coded(later, found)
    fresh_N = np.isin(names, new)
    occupied = np.array(sorted(before.values()))
    whole = assign_unique(
        codes_NL[fresh_N], residual_NZ[fresh_N], books, names[fresh_N], occupied=occupied, method="exact"
    )
    assert [after[name] for name in names[fresh_N]] == [tuple(row) for row in whole.codes_NL.tolist()]
    # Nothing has changed: the IDs of the release are taken as they are. With another setting the ledger goes on.
    assert assigned(later, found, base_on(later, found, second), keeps=True).digest == second.digest
    others = later.model_copy(update={"ids": later.ids.model_copy(update={"encode_rows": later.ids.encode_rows + 1})})
    third = assigned(others, found, base_on(later, found, second), keeps=True)
    assert third.metrics["ledger"]["kept"] == 3250 and third.metrics["encoded"] == 0
    assert ids_of(later, third) == after and third.extends["ids"] == [second.digest, first.digest]
    # Two releases after they left the quarantine is over: copies of the products that are gone get the free IDs.
    copies = tmp_path / "copies"
    copies.mkdir()
    old = pq.read_table(folder / "data" / "products.parquet")
    again = old.slice(0, 50).set_column(0, "product_id", pa.array([f"again-{number:02d}" for number in range(50)]))
    write_catalogue(copies, pa.concat_tables([pq.read_table(tmp_path / "data" / "products.parquet"), again]))
    last = recipe_of(copies, rows_per_part=400).model_copy(update={"store": recipe.store})
    found = parts_of(last, "embeddings") | {"quantizer": parts["quantizer"]}
    fourth = assigned(last, found, base_on(last, found, third), keeps=True)
    reused = {before[name] for name in gone} & set(ids_of(last, fourth).values())
    assert fourth.metrics["ledger"]["new"] == 50 and reused
    assert fourth.metrics["churn"]["after"]["addresses_reused"] == 0  # nobody of the release before had them


def test_an_append_keeps_what_was_given_while_the_release_served(world, tmp_path):
    folder, recipe, parts = world
    first = assigned(recipe, parts)
    before, base = ids_of(recipe, first), base_on(recipe, parts, first)
    gone, new = grown(folder, tmp_path, drop=1, add=3, seed=11)
    later = recipe_of(tmp_path).model_copy(update={"store": recipe.store})
    found, space = parts_of(later, "embeddings") | {"quantizer": parts["quantizer"]}, DocidSpace(CODES)
    plain = ids_of(later, assigned(later, found, base, keeps=True))
    packed = np.setdiff1d(np.arange(np.prod(CODES)), space.pack(np.array(sorted({*before.values(), *plain.values()}))))
    mine, elsewhere, other = (tuple(codes) for codes in space.unpack(packed[:3]).tolist())
    stays = next(name for name in before if name not in gone)
    given = [(new[0], mine), (new[1], before[stays]), ("not-in-the-catalogue", elsewhere), (stays, other)]
    log = LiveLog(Store(recipe.store), base.release.name)
    for number, (name, codes) in enumerate(given, 1):
        log.write(number, {"kind": "insert", "products": [{"product_id": name, "docid": space.text(codes)}]})
    try:
        second = assigned(later, found, base, keeps=True)
    finally:
        shutil.rmtree(f"{recipe.store}/live")
    after = ids_of(later, second)
    assert after[new[0]] == mine, "a new product keeps the ID that it was served under"
    assert after[stays] == before[stays], "no ID of the release moves"
    assert after[new[1]] == plain[new[1]] and after[new[2]] == plain[new[2]], "a taken ID is not claimed"
    assert second.metrics["ledger"] == {"kept": 3000, "new": 2, "moved": 0, "retired": 2, "live": 3002}
    entry = pc.index(ledger_of(later, second)["product_id"], "not-in-the-catalogue").as_py()
    row = ledger_of(later, second).slice(entry, 1).to_pylist()[0]
    assert (tuple(row["codes"]), row["status"], row["since"], row["until"]) == (elsewhere, "retired", 1, 4)


def test_a_full_re_id_reports_its_churn(world, tmp_path):
    folder, recipe, parts = world
    first = assigned(recipe, parts)
    before, base = ids_of(recipe, first), base_on(recipe, parts, first)
    gone, new = grown(folder, tmp_path, drop=50, add=100, seed=4)
    later = recipe_of(tmp_path).model_copy(update={"store": recipe.store, "seed": 3})
    found = parts_of(later, "quantizer")
    job = Job(recipe=later, store=Store(later.store), peak=cluster.PeakMemory(), previous=base)
    aligned = realign.run(job, found)
    assert np.mean(aligned.metrics["agreement_after"]) > np.mean(aligned.metrics["agreement_before"])
    second = assigned(later, found | {"quantizer": aligned}, base)
    after, churn = ids_of(later, second), second.metrics["churn"]
    assert not {before[name] for name in gone} & set(after.values())
    common = sorted(set(before) & set(after))
    expected = [np.mean([before[n][:m] != after[n][:m] for n in common]) for m in (1, 2, 3)]
    assert churn["after"]["prefix_churn"] == pytest.approx(expected) and churn["after"]["common"] == len(common)
    assert churn["before"]["prefix_churn"][0] > churn["after"]["prefix_churn"][0]
    named = {docid: name for name, docid in before.items()}
    reused = {docid for name, docid in after.items() if named.get(docid, name) != name}
    assert churn["after"]["addresses_reused"] == len(reused) and churn["after"]["addresses"] == len(before)
    # An append on top keeps the names as they are, so there is nothing to compare without realignment.
    renamed = found | {"quantizer": aligned}
    third = assigned(later, renamed, base_on(later, renamed, second), keeps=True)
    assert set(third.metrics["churn"]) == {"after"} and third.metrics["churn"]["after"]["prefix_churn"] == [0.0] * 3
    ledger = second.metrics["ledger"]
    assert (
        ledger["kept"] == sum(before[n] == after[n] for n in common)
        and ledger["retired"] == 50
        and ledger["new"] == 100
    )
