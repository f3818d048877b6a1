"""A release that lives: append, refuse, two at once, then a full re-ID on top; codes by k-means, and as generator one epoch of a
text encoder, tuned first and then frozen, under our decoder, taught by labels and a teacher, over the trie alone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts import manifest, trials
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.config import Recipe
from catid2_ray.errors import CommitConflict, LeaseError, QualityGateError, RecipeError, ReleaseError
from catid2_ray.generator.users import Reading, User
from catid2_ray.on_ray.commands import GateFailed, append_items, publish, reindex
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.look.dry_run import dry_run
from catid2_ray.on_ray.machine.query_encoder import open_retriever, tuned_folder
from catid2_ray.on_ray.pipeline import APPENDED, append
from catid2_ray.on_ray.serve.api import Churn
from tests.command import job_here, write_recipe
from tests.conftest import TINY
from tests.text_models import save_bert

MADE = generate(products=300, queries=120, seed=3)
ENCODER = {}  # its folder, the same in all recipes: it is part of what the generator's artefact is named by


def write_shop(folder, *, first=0, end=260, pairs=True) -> None:
    """Products `first` … `end` − 1 of the made ones."""
    folder.mkdir(exist_ok=True)
    pq.write_table(MADE.products.slice(first, end - first), folder / "products.parquet")
    if pairs:
        pq.write_table(MADE.pairs, folder / "pairs.parquet")


def recipe_of(shop, store, **sections) -> Recipe:
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY.items()}
    values |= {"store": str(store), "catalog": {"root": str(shop), "rows_per_part": 100}}
    values["embedding"] = values["embedding"] | {
        "adapter": "linear", "encoder": ENCODER["folder"], "encoder_mode": "tuned", "tokens": 32,
    }  # fmt: skip
    values["tuning"] = {"epochs": 2, "learning_rate": 1e-2}
    values["quantizer"] = {"kind": "rq_kmeans", "codes_per_level": [8, 8, 8, 8], "kmeans_sample": 200}
    values["generator"] |= {
        "epochs": 1,
        "mix": {"query": 1, "teacher": 0.5, "title": 0.1},
        "loss": "trie",
        "model": "encoder_decoder",
        "encoder": ENCODER["folder"],
        "head": "dense",
    }
    values["serving"] = values.get("serving", {}) | {"normalize": "trie"}
    for section, change in sections.items():
        values[section] = values[section] | change
    return Recipe.build(values)


def ids_of(store: Store, manifest) -> dict[str, str]:
    found = pa.concat_tables([store.read_table(manifest.file(entry["name"])) for entry in manifest.parts()])
    return dict(zip(found["product_id"].to_pylist(), found["docid"].to_pylist()))


@pytest.fixture(scope="module")
def published(tmp_path_factory, no_ray):
    """A folder with shop/ and store/, in which one release is current."""
    folder = tmp_path_factory.mktemp("append")
    texts = [*MADE.products["title"].to_pylist(), *MADE.pairs["query"].to_pylist()]
    words = sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})
    ENCODER["folder"] = save_bert(folder / "bert", words)
    write_shop(folder / "shop")
    return folder, reindex(recipe_of(folder / "shop", folder / "store"))


@pytest.fixture
def copied(published, tmp_path):
    """A copy of that store for a test to change; the release in it."""
    folder, outcome = published
    shutil.copytree(folder / "store", tmp_path / "store")
    return tmp_path, outcome


def test_appended_products_are_served_by_the_old_generator(copied):
    folder, first = copied
    write_shop(folder / "shop", first=10, end=290)
    strict = recipe_of(folder / "shop", folder / "store", evaluation={"min_beam_to_bm25": 1e6})
    for _ in range(2):  # a rerun finds all that was made, and is stopped again
        with pytest.raises(GateFailed, match="Nothing was published"):
            append_items(strict)
    with Job.open(strict, only=APPENDED) as job:
        append(job)
    assert job.made == [] and releases.current(Store(strict.store)).name == first.release.name
    recipe = recipe_of(folder / "shop", folder / "store")
    store, outcome = Store(recipe.store), append_items(recipe, trial=Shares(5))
    assert releases.current(store).name == first.release.name
    assert trials.running(store).release == outcome.release.name
    trials.promote(store)
    before, after = ids_of(store, first.parts["ids"]), ids_of(store, outcome.parts["ids"])
    gone, new = set(before) - set(after), set(after) - set(before)
    assert len(gone) == 10 and len(new) == 30
    assert all(after[name] == before[name] for name in set(before) & set(after))
    assert len(set(after.values())) == 280 and not {before[name] for name in gone} & set(after.values())
    assert outcome.figures["ledger"] == {"kept": 250, "new": 30, "moved": 0, "retired": 10, "live": 280}
    assert outcome.figures["churn"] == {"after": outcome.figures["churn"]["after"]}
    said = Churn.of(outcome.parts["ids"].metrics)
    assert said == Churn(base=first.release.name, changed=0, new=30, left=10)
    assert Churn.of(first.parts["ids"].metrics) is None
    assert outcome.figures["number"] == 2 and outcome.figures["base"] == first.release.name
    release = releases.current(store)
    parts = release.manifests(store)
    assert release.name == outcome.release.name != first.release.name
    for part in ("tuned_encoder", "adapter", "quantizer", "examples", "generator"):
        assert parts[part].digest == first.parts[part].digest
    retriever = open_retriever(releases.release_folder(store, release, folder / "cache"))
    hits = retriever.retrieve([MADE.pairs["query"][0].as_py()], k=280)[0]
    assert {hit.product_id: hit.docid_text for hit in hits}.items() <= after.items() and hits

    again = append_items(recipe)
    assert again.made == []
    assert again.release.name == release.name and releases.pointer(store)[0] == 2
    # A third release on top of it, and the way back: products that return while in quarantine get their own IDs. As a user
    # does it, with a job.
    write_shop(folder / "shop", first=0, end=300)
    path = write_recipe(folder, recipe.model_dump(mode="json"))
    ended = job_here("append_items", "--recipe", path, "--json", folder / "append.json")
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((folder / "append.json").read_text())
    assert figures["number"] == 3 and figures["ledger"]["retired"] == 0 and figures["release"] in ended.stdout
    third = releases.current(store).manifests(store)
    assert before.items() <= ids_of(store, third["ids"]).items()
    assert third["generator"].digest == first.parts["generator"].digest
    assert third["ids"].extends["ids"] == [
        outcome.parts["ids"].digest,
        first.parts["ids"].digest,
    ]


def test_new_pairs_alone_remake_what_learns_from_them(copied):
    """The tuned encoder, the vectors, the adapter, the quantizer and the IDs stay those of the first release."""
    folder, first = copied
    nobody = {"split": ["train"], "relevance": [3.0], "query": ["a shelf that nobody asked for"], "query_id": ["new"]}
    new = pa.table({**nobody, "product_id": [MADE.products["product_id"][0].as_py()]})
    table = pa.concat_tables([MADE.pairs, new.select(MADE.pairs.column_names).cast(MADE.pairs.schema)])
    write_shop(folder / "shop")
    pq.write_table(table, folder / "shop" / "pairs.parquet")
    recipe = recipe_of(folder / "shop", folder / "store")
    outcome = reindex(recipe)
    assert outcome.made == ["pairs", "examples", "generator", "mixture", "evaluation"]
    same = [name for name, part in outcome.parts.items() if part.digest == first.parts[name].digest]
    assert {"catalog", "tuned_encoder", "embeddings", "adapter", "quantizer", "ids", "serving"} <= set(same)
    assert outcome.figures["number"] == 1 and outcome.release.name != first.release.name
    anew = dry_run(recipe, refresh_encoder=True)["stages"]
    assert [row["stage"] for row in anew if row["does"] == "found"] == ["catalog", "pairs"]
    assert [row["stage"] for row in anew if row["does"] == "made"][:3] == ["lessons", "tuned_encoder", "embeddings"]


def test_a_tuned_encoder_is_what_everything_goes_through(published, monkeypatch):
    """One pass of the tuned encoder, which lies in the generator, gives a query its states and its vector; the base model that the
    recipe names is not asked for."""
    folder, first = published
    store, parts = Store(folder / "store"), first.parts
    assert parts["tuned_encoder"].metrics["adopted"], "else the rest says nothing"
    digest = parts["tuned_encoder"].digest
    assert parts["generator"].settings["tuned_encoder"] == parts["generator"].parents["tuned_encoder"] == digest
    settings = releases.retriever_settings(parts, release="r")
    assert settings["shared_encoder"] and settings["encoder"]["tuned"] == digest
    monkeypatch.setattr("catid2_ray.catalog.text._load_pretrained", lambda name: pytest.fail(f"{name} is loaded"))
    retriever = open_retriever(releases.release_folder(store, first.release, folder / "cache"))
    query = MADE.pairs["query"][0].as_py()
    monkeypatch.undo()
    alone = HuggingFaceEncoder(tuned_folder(store, parts["tuned_encoder"]), batch=4, tokens=12).encode([query])
    base = HuggingFaceEncoder(ENCODER["folder"], batch=4, tokens=12).encode([query])
    np.testing.assert_allclose(retriever._encoded([query])[2].dense_BE, alone, atol=1e-4)
    assert np.abs(alone - base).max() > 1e-2
    # Asked by somebody the generator reads more, and the query's vector is the same.
    retriever.reading = Reading(tokens=4, recent=0)
    mine, anybody = (retriever._asked([query], users, retriever.live.view) for users in ([User(("green",))], None))
    assert mine[0].tolist() != anybody[0].tolist() and mine[3].tolist() == anybody[3].tolist()


def test_two_appends_at_once_one_wins_and_nothing_is_lost(copied):
    folder, first = copied
    write_shop(folder / "slow", end=270, pairs=False)
    write_shop(folder / "fast", end=275, pairs=False)
    slow, fast = (recipe_of(folder / shop, folder / "store") for shop in ("slow", "fast"))
    with Job.open(slow, only=APPENDED) as job:
        parts = append(job)
        with pytest.raises(LeaseError, match=r"another job works on .* last heartbeat was \d+ s ago.*--wait"):
            append_items(fast)
    # Without the lease, as by a job that hung until another had taken it, the pointer alone decides.
    won = append_items(fast)
    with pytest.raises(
        CommitConflict, match="another job published .* nothing was lost. .* rerun to build on top of it"
    ):
        releases.publish(job.store, parts, after=job.pointer)
    assert releases.current(job.store).name == won.release.name
    # Without pairs there is nothing to measure: the release keeps the evaluation of the one before.
    assert won.parts["evaluation"].digest == first.parts["evaluation"].digest and "evaluation" not in won.made
    rerun = append_items(slow)
    assert rerun.figures["base"] == won.release.name and rerun.figures["ledger"]["retired"] == 5
    kept, before = ids_of(job.store, rerun.parts["ids"]), ids_of(job.store, won.parts["ids"])
    assert kept.items() <= before.items()


def test_what_does_not_belong_to_the_release_is_refused(copied, tmp_path):
    folder, first = copied
    write_shop(folder / "shop", end=270)
    shop, store = folder / "shop", Store(folder / "store")
    with pytest.raises(ReleaseError, match="nothing was published .* nothing to append to: run `catid2 reindex` first"):
        append_items(recipe_of(shop, tmp_path / "empty"))
    with pytest.raises(
        RecipeError, match="keeps the adapter of release .*, which is linear, but embedding.adapter is none"
    ):
        append_items(recipe_of(shop, store.uri, embedding={"adapter": "none"}))
    with pytest.raises(RecipeError, match=r"quantizer.codes_per_level is \[8, 8, 16\], the release has \[8, 8, 8, 8\]"):
        append_items(
            recipe_of(shop, store.uri, quantizer={"codes_per_level": [8, 8, 16]}, catalog={"max_category_depth": 2})
        )
    with pytest.raises(RecipeError, match="embedding.width is 8, the release has 16.*run `catid2 reindex`"):
        append_items(recipe_of(shop, store.uri, embedding={"width": 8}))
    path = Path(store.path(first.parts["ids"].name))
    fields = json.loads(path.read_text().replace(first.parts["quantizer"].digest, "0" * 64))
    del fields["metrics"][manifest._CHECK]
    fields["metrics"][manifest._CHECK] = manifest.digest_of(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ReleaseError, match="ids was made from quantizer 000000000000"):
        append_items(recipe_of(shop, store.uri))
    shutil.rmtree(f"{store.uri}/artifacts/ids")
    with pytest.raises(
        ReleaseError,
        match=r"its part ids \(.*\) is gone.*restore the release, or begin a ledger anew with .*--new-ledger",
    ):
        append_items(recipe_of(shop, store.uri))
    assert releases.pointer(store) == (1, first.release.name)


def test_a_full_re_id_goes_on_from_the_release_and_its_churn_is_gated(copied):
    folder, first = copied
    write_shop(folder / "shop", first=10, end=290)
    warm = {"quantizer": {"warm_start": True}}
    recipe = recipe_of(folder / "shop", folder / "store", **warm, ids={"max_churn": 0.0})
    store = Store(recipe.store)
    with pytest.raises(
        QualityGateError,
        match=r"% of the 250 products that release r-.* has too get another ID, above ids.max_churn 0.0",
    ):
        reindex(recipe)
    assert releases.pointer(store) == (1, first.release.name) and not store.exists("artifacts/generator/none")
    # A kind of IDs that is not followed would end the ledger.
    unfollowed = {"quantizer": {"kind": "rq_kmeans", "ids": "suffix"}, "ids": {"max_churn": 0.5}}
    with pytest.raises(ReleaseError, match="makes IDs of kind 'suffix', which are not followed.*--new-ledger"):
        reindex(recipe_of(folder / "shop", folder / "store", **unfollowed))
    outcome = reindex(recipe_of(folder / "shop", folder / "store", **warm, ids={"max_churn": 1.0}))
    figures = outcome.figures
    assert figures["number"] == 2 and figures["base"] == first.release.name
    before, after = ids_of(store, first.parts["ids"]), ids_of(store, outcome.parts["ids"])
    common = set(before) & set(after)
    share = np.mean([before[name] != after[name] for name in common])
    assert figures["churn"]["after"]["prefix_churn"][-1] == pytest.approx(share)
    changed, gone = sum(before[name] != after[name] for name in common), len(before) - len(common)
    said = Churn.of(outcome.parts["ids"].metrics)
    assert said == Churn(base=first.release.name, changed=changed, new=len(after) - len(common), left=gone) and changed
    # Realignment renames first codes for the best; of whole IDs that promises nothing.
    first_code = {when: figures["churn"][when]["prefix_churn"][0] for when in ("before", "after")}
    assert first_code["before"] >= first_code["after"]
    # The rerun of a published job finds everything, though the current release is now its own.
    again = reindex(recipe_of(folder / "shop", folder / "store", **warm, ids={"max_churn": 1.0}))
    assert again.made == [] and again.release.name == outcome.release.name
    assert publish(recipe_of(folder / "shop", folder / "store", **warm))[1].name == outcome.release.name
