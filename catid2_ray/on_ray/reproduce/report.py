"""From what was measured to files: report.html, report.md, report.json, pictures, and TREC's runs and qrels."""

import dataclasses
import json
import platform
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path

import numpy as np

from catid2_ray import __version__
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import join_text
from catid2_ray.config import Recipe
from catid2_ray.errors import CatidError, InputError, Interrupted
from catid2_ray.evaluation.page import png
from catid2_ray.evaluation.reproduce import trec
from catid2_ray.evaluation.reproduce.conditions import METHODS, PAPER_LOCALES, WITH, WITHOUT, rows_of
from catid2_ray.evaluation.reproduce.measures import query_groups
from catid2_ray.evaluation.reproduce.ranking import unit
from catid2_ray.evaluation.reproduce.report import Facts, Written, write
from catid2_ray.evaluation.reproduce.scores import Judged
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.reports import docids_of, examples_of, images_of, parts_of_kind, sample_of
from catid2_ray.on_ray.reproduce.measure import Measures
from catid2_ray.on_ray.reproduce.nearest import read_file
from catid2_ray.on_ray.reproduce.run import Reproduction

_LIBRARIES = ("torch", "transformers", "ray", "numpy", "bm25s", "faiss-cpu")  # those that figures depend on
_LEARNED = {  # what a reader must know of another split than test
    "train": "; THEY WERE LEARNED FROM: figures say nothing of other queries",
    "validation": "; the adapter, and the weights of what is served, were chosen on them, so figures flatter these",
}
_COMPARED = 1000  # products whose text is read with and without its category


def data_of(recipe: Recipe) -> tuple[str, str | None]:
    """What the data set is called in cells, and its locale in the paper; None for other data."""
    locale = recipe.name.removeprefix("esci_")
    return (locale, locale) if recipe.name.startswith("esci_") and locale in PAPER_LOCALES else (recipe.name, None)


def published() -> dict:
    """What the paper prints."""
    return json.loads(
        resources.files("catid2_ray.evaluation.reproduce").joinpath("published.json").read_text(encoding="utf-8")
    )


def other_report(path: str) -> dict:
    """report.json of another data set. Raises InputError for what is none, or has no Table 2."""
    text = read_file(path, "--beside")
    try:
        found = json.loads(text)
        rows = found["tables"]["T2"]["rows"].values()
        if not all("title" in row for row in rows) or not isinstance(found["data"], str):
            raise KeyError("title")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"--beside: {path} is no report.json with a Table 2: name one that `catid2 reproduce` wrote"
        ) from None
    return found


def report(
    reproduction: Reproduction, *, tables: Sequence[str], command: str, link: str = "", others: Sequence[dict] = ()
) -> Written:
    """To be called while the job is open. `link`: as in `evaluation.reproduce.report.write`; `others`: of other data sets, as
    `other_report` reads them."""
    bench, measures = reproduction.bench, reproduction.measures
    judged = Judged(
        bench.judged["test"], bench.gains,
        query_groups(bench.judged["test"].queries, bench.products["title"].to_pylist()),
        {name: path[0] if path else "" for name, path in zip(bench.product_ids, bench.products["category_path"].to_pylist())},
    )  # fmt: skip
    data, locale = data_of(bench.recipe)
    images, examples = _of_kinds(measures) if "8" in tables else ({}, [])
    facts = Facts(
        data, locale, command, _about(reproduction), _table_1(reproduction), examples,
        _distance(measures) if "4" in tables else None, images, published(),
        bench.recipe.reproduce.machine_hour, _diagnosis(reproduction), others,
    )  # fmt: skip
    wanted = {run.parents["ids"] for outcome in reproduction.outcomes for run in outcome.runs if run.ids is not None}
    docid_of = {}
    for digest in sorted(wanted & measures.ids.keys()):
        docid_of[digest] = dict(zip(bench.product_ids, measures.codes(measures.ids[digest])[1]))
    return write(reproduction.outcomes, judged, facts, docid_of=docid_of, tables=tables, link=link)


def keep(written: Written, reproduction: Reproduction, folder: Store, below: str = "") -> str:
    """Writes all files below a folder of a store; returns where the page is."""
    files = {"report.html": written.html.encode(), "report.md": written.markdown.encode(),
             "report.json": (json.dumps(written.json, indent=1, ensure_ascii=False) + "\n").encode()}  # fmt: skip
    for name, figure in written.pictures.items():
        files[name] = png(figure)
    bench = reproduction.bench
    query_ids = bench.judged["test"].query_ids
    files["trec/qrels.txt"] = trec.qrels_lines(query_ids, bench.gains).encode()
    for outcome in reproduction.outcomes:
        for run in outcome.runs:
            name = f"{outcome.cell.name.replace('/', '-')}-seed{run.seed}"
            files[f"trec/{name}.txt"] = trec.run_lines(query_ids, run.ranked, name).encode()
    for name, data in files.items():
        folder.write(f"{below}{name}", data)
    return folder.uri_of(f"{below}report.html")


def _about(reproduction: Reproduction) -> dict[str, str]:
    bench, parts = reproduction.bench, reproduction.parts
    recipe, judged = bench.recipe, bench.judged["test"]
    aside = parts["pairs"].metrics["reasons"]
    machines = sorted({run.machine for outcome in reproduction.outcomes for run in outcome.runs})
    seeds = sorted({run.seed for outcome in reproduction.outcomes for run in outcome.runs})
    return {
        "catalogue": f"{bench.products.num_rows:,} products; categories by depth {parts['catalog'].metrics['categories']}",
        "queries": f"{len(judged.queries):,} of split {recipe.evaluation.split}"
        + (f"; {bench.unanswerable:,} more have no relevant product there and are not asked" if bench.unanswerable else "")
        + _LEARNED.get(recipe.evaluation.split, ""),
        "labels": f"relevant from {recipe.evaluation.min_relevance:g}, teaching from "
            f"{recipe.generator.min_relevance:g}; {bench.zero_grade:g} has gain 0",
        **{f"answers of {one.cell.row.condition.name}, as given": _of_given(one.runs[0].tuned)
           for one in reproduction.outcomes if one.runs and one.cell.row.condition.family == "run"},
        "pairs set aside": "; ".join(f"{count:,}: {reason}" for reason, count in sorted(aside.items())) or "none",
        "embedding": f"{Path(recipe.embedding.encoder).name} of {', '.join(recipe.embedding.text)}"
        + ("" if "adapter" in parts else "; no adapter"),
        "IDs": f"{recipe.quantizer.codes_per_level} codes per level, {recipe.quantizer.epochs} epochs, batch "
            f"{recipe.quantizer.batch}"
        + (f"; as printed {recipe.reproduce.printed_epochs} epochs" if recipe.reproduce.printed_epochs else ""),
        "generators trained in full": f"{recipe.generator.model}, {recipe.generator.epochs} epochs of batch "
            f"{recipe.generator.batch}; head {recipe.generator.head} in what is served, plain on the kinds of IDs",
        "seeds": ", ".join(map(str, seeds)) or "none",
        "versions": f"catid2-ray {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES if _installed(name)),
        "machine": "; ".join(machines) or "–",
    }  # fmt: skip


def _of_given(counted: Mapping[str, int]) -> str:
    """Of another search: what it did not answer, and what it named that nobody knows here."""
    return (f"{counted['unanswered']:,} queries unanswered, {counted['unknown_products']:,} answers that are no product of the "
            f"catalogue, {counted['not_asked']:,} queries that are not asked")  # fmt: skip


def _installed(library: str) -> bool:
    try:
        return bool(metadata.version(library))
    except metadata.PackageNotFoundError:
        return False


def _table_1(reproduction: Reproduction) -> dict[str, int]:
    bench = reproduction.bench
    generator, judged = bench.recipe.generator, bench.judged["test"]
    taught = training_pairs(bench.pairs, generator.min_relevance, generator.relevance_weights)
    return {
        "documents": bench.products.num_rows, "train_queries": len(taught["query_id"].unique()), "train_pairs": taught.num_rows,
        "test_queries": len(judged.queries), "test_pairs": sum(map(len, judged.relevant)),
    }  # fmt: skip


def _of_kinds(measures: Measures) -> tuple[dict, list[Mapping[str, str]]]:
    """Figures 3, 4 and 6 of both kinds, and Table 8; none where their IDs cannot be made or found."""
    images, samples = {}, {}
    for kind, title in (("cat_id2", "CAT-ID² (ours)"), ("tiger", "TIGER")):
        try:
            condition = next(one for one in METHODS if one.name == kind)
            recipe = measures.recipe_of(condition, measures.job.recipe.seed)
            job, parts = measures.embedded(recipe)
            job = dataclasses.replace(job, recipe=recipe)
            of_kind = parts_of_kind(job, parts)
            samples[kind] = sample_of(job, of_kind), docids_of(job, of_kind)
            images |= {
                f"{title}. {caption}": figure for caption, figure in images_of(job, of_kind, samples[kind][0]).items()
            }
        except Interrupted:
            raise
        except CatidError as error:
            progress.event("without_pictures", kind=kind, reason=repr(str(error)))
        except Exception:
            traceback.print_exc()
    if len(samples) < 2:
        return images, []
    return images, examples_of(samples["cat_id2"][0], samples["tiger"][1])


def _diagnosis(reproduction: Reproduction) -> dict | None:
    """Of the release that the rows `served` and `generator` are of; None without one, or where nothing was diagnosed."""
    store = reproduction.job.store
    if not any(run.seed == reproduction.job.recipe.seed for one in reproduction.outcomes
               if one.cell.row.condition.family == "release" for run in one.runs):  # fmt: skip
        return None
    evaluation = releases.current(store).manifests(store)["evaluation"]
    found = json.loads(store.read(evaluation.file("figures.json"))).get("diagnosis")
    return found if found and found["queries"] else None


def _distance(measures: Measures) -> dict[str, float] | None:
    """Cosines between the vectors that the recipe's own encoder gives to products' texts with the category and without it, over a
    seeded sample; None where no encoder is known. Encoders made of either text would differ for other reasons."""
    recipe, bench = measures.job.recipe, measures.bench
    rows = {row.condition.name: row.condition for row in rows_of("4", (), text=recipe.embedding.text)}
    try:
        encode = bench.vectors(measures.job, measures.parts).encode
    except CatidError:
        return None
    count = bench.products.num_rows
    chosen = np.sort(np.random.default_rng(recipe.seed).permutation(count)[:_COMPARED])
    products = bench.products.take(chosen)
    texts = [join_text(products, rows[f"tiger_{word}_category"].recipe["embedding.text"]) for word in (WITH, WITHOUT)]
    one_ND, other_ND = (unit(np.asarray(encode(of_word), np.float32)) for of_word in texts)
    cosine_N = (one_ND * other_ND).sum(1)
    return {
        f"mean cosine of a product's two vectors, by the recipe's own encoder, over {len(chosen):,} products": float(
            cosine_N.mean()
        ),
        "5 % are below": float(np.quantile(cosine_N, 0.05)),
    }
