"""Commands that look and change nothing: at a catalogue, a recipe, a product, an answer."""

import json
from pathlib import Path
from typing import Annotated

import typer

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.cli.options import DEFAULT_STORE, RecipeOption, SetOption, StoreOption, console, json_writer
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError

OPEN: dict[str, object] = {}  # retrievers of this process, by the release's name
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="write all of it to this file; - = standard output, without tables"),
]


def current_retriever(store: Store):
    """Of the current release, with its query encoder and the changes made to it since."""
    from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
    from catid2_ray.on_ray.machine.query_encoder import open_retriever

    release = releases.current(store)
    if release.name not in OPEN:
        opened = open_retriever(releases.release_folder(store, release, releases.default_cache()))
        LiveUpdates(opened, LiveLog(store, release.name)).catch_up()
        OPEN[release.name] = opened
    return OPEN[release.name]


def _checked(uri: str) -> Store:
    store = Store(uri)
    store.check()
    return store


def _show(figures: dict, tables: list, json_file: str | None) -> None:
    from catid2_ray.evaluation.tables import terminal

    if json_file == "-":
        print(json.dumps(figures, indent=1, ensure_ascii=False))
        return
    json_writer(json_file, submitted=False)(figures)
    console().print(terminal(tables))


def init(
    folder: Annotated[str, typer.Argument(help="folder or s3:// prefix with products and, if there are any, pairs")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="write the recipe here, not to standard output")
    ] = None,
) -> None:
    """Look at a catalogue and write a first recipe that fits it, with the reason for each setting."""
    from catid2_ray.on_ray.look.first_recipe import first_recipe

    if out and Path(out).exists():
        raise InputError(f"{out} is there already: give --out another name, or remove it")
    looked = first_recipe(folder)
    if out is None:
        print(looked.recipe, end="")
        return
    Path(out).write_text(looked.recipe, encoding="utf-8")
    shown = console()
    shown.print(looked.found)
    shown.print(
        f"\nThe recipe, with the reason for each setting: {out}\nTry next:\n  catid2 check --recipe {out}\n"
        f"  catid2 reindex --recipe {out}\n  catid2 search \"YOUR QUERY\" --store {looked.store}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def check(recipe: RecipeOption, overrides: SetOption = None, json_file: JsonOption = None) -> None:
    """Read a recipe's tables as `reindex` would, refuse what it would refuse, and say what it would train. Changes nothing."""
    from catid2_ray.evaluation.look_tables import check_tables
    from catid2_ray.on_ray.look.check import check as run

    figures = run(Recipe.load(recipe, overrides or []))
    _show(figures, check_tables(figures), json_file)


def plan(
    recipe: RecipeOption,
    products: Annotated[float, typer.Option(min=1, help="how many products, such as 1e8")],
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="YAML: cpu-data, gpu-train (an hour of a machine), storage (GB a month), transfer (GB)"
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=2, help="numbers of a vector, where the recipe does not say it")] = 384,
    overrides: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Estimate what a recipe takes at a size: machine-hours, memory, storage, transfer and cost, from measured rates."""
    from catid2_ray.evaluation.look_tables import plan_tables
    from catid2_ray.on_ray.look.plan import plan as run
    from catid2_ray.on_ray.look.plan import read_prices

    loaded = Recipe.load(recipe, overrides or [])
    figures = run(loaded, products=int(products), width=width, prices=read_prices(prices) if prices else None)
    _show(figures, plan_tables(figures), json_file)


def show_dry_run(recipe: Recipe, choices: dict[str, bool], json_file: str | None) -> None:
    from catid2_ray.evaluation.look_tables import dry_run_tables
    from catid2_ray.on_ray.look.dry_run import dry_run

    figures = dry_run(recipe, **choices)
    _show(figures, dry_run_tables(figures), json_file)


def inspect(
    product_id: str,
    store: StoreOption = DEFAULT_STORE,
    neighbours: Annotated[
        int, typer.Option(min=0, help="products shown beside it; 0 = none, which reads no vectors")
    ] = 5,
    json_file: JsonOption = None,
) -> None:
    """Show what a store knows of a product: its text, ID, neighbours by ID and by vector, and its history in the ledger."""
    from catid2_ray.evaluation.look_tables import product_tables
    from catid2_ray.on_ray.look.product import inspect as run

    card = run(_checked(store), product_id, neighbours=neighbours)
    _show(card, product_tables(card), json_file)


def why(
    query: str,
    product_id: str,
    store: StoreOption = DEFAULT_STORE,
    k: Annotated[int, typer.Option(help="a product counts as found among so many answers")] = 10,
    exact: Annotated[
        bool, typer.Option("--exact", help="also its rank among all IDs, for which the generator reads the whole trie")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Say why a query finds a product, or does not: its path through the search level by level, and what its score is made of."""
    from catid2_ray.evaluation.look_tables import why_tables
    from catid2_ray.evaluation.why import why as run

    found = run(current_retriever(_checked(store)), query, product_id, k=k, exact=exact)
    _show(found.figures(), why_tables(found), json_file)


def diagnose(
    store: StoreOption = DEFAULT_STORE,
    release: Annotated[str | None, typer.Option(help="its name; left out: the current one")] = None,
    queries: Annotated[int, typer.Option(min=1, help="how many at most; each costs a decoder row per prefix")] = 20,
    split: Annotated[str, typer.Option(help="queries of this split of the release's pairs")] = "validation",
    json_file: JsonOption = None,
) -> None:
    """Say where relevant products are lost: score all IDs exactly, in this process, and compare with beams of several widths."""
    from catid2_ray.evaluation.report import diagnosis_tables
    from catid2_ray.on_ray.commands import diagnose_release

    figures = diagnose_release(store, release=release, queries=queries, split=split)
    _show(figures, diagnosis_tables(figures["diagnosis"]), json_file)


COMMANDS = (init, check, plan, inspect, why, diagnose)
