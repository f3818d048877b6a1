"""`catid2 …`: the command line, thin over the same calls as jobs/.

Results go to standard output, progress and events to standard error. A deliberate error is one message and the exit code
of its class; anything else is a bug and keeps its traceback.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import KINDS, Recipe, schema
from catid2_ray.errors import CatidError, InputError, Interrupted

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Semantic IDs for a catalogue, a generator that learns them, and the search that serves them.",
)  # fmt: skip

RecipeOption = Annotated[str, typer.Option("--recipe", help="YAML recipe, such as jobs/recipes/quickstart.yaml")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a recipe field; repeatable")
]
JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the figures to this file")]
StoreOption = Annotated[str, typer.Option("--store", envvar="CATID2_STORE", help="folder or s3:// prefix of the store")]
_DEFAULT_STORE = "catid2_store"


def guarded(call: Callable[[], None]) -> None:
    """Run; a CatidError becomes its message on standard error and its exit code, a Ctrl-C outside of any job 130."""
    # Bars of model loading, a tenth of a second long, only break up our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _refuse_other_bytes(sys.argv[1:])
        call()
    except CatidError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]{type(error).__name__}[/]", end=": ")
        # What a message quotes may be no text that the terminal can show.
        print(str(error).encode(errors="backslashreplace").decode(), file=sys.stderr)
        if isinstance(error, Interrupted):
            _leave(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("ended by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None


def _leave(code: int) -> None:
    """At once: Ray is shut down, and taking all libraries down took up to ten seconds on a busy machine."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse_other_bytes(arguments: list[str]) -> None:
    """Bytes of an argument that are not UTF-8 come in as half a character, which nothing further on can write or read."""
    for place, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"argument {place} is not UTF-8: {os.fsencode(argument)!r}. Give it in UTF-8; `locale` says what the terminal sends"
            ) from None


@app.command()
def reindex(recipe: RecipeOption, overrides: SetOption = None, json_file: JsonOption = None) -> None:
    """The main job: embed, train, assign unique IDs, train the generator, evaluate, publish. Continues where it was left."""
    from catid2_ray.on_ray.commands import reindex as run

    _run_and_show(run, Recipe.load(recipe, overrides or []), json_file)


@app.command()
def append(recipe: RecipeOption, overrides: SetOption = None, json_file: JsonOption = None) -> None:
    """Today's catalogue under the published quantizer and generator: new products get free IDs, no published ID moves."""
    from catid2_ray.on_ray.commands import append_items as run

    _run_and_show(run, Recipe.load(recipe, overrides or []), json_file)


def _run_and_show(run: Callable, loaded: Recipe, json_file: str | None) -> None:
    """Run to a published release, show its figures and a few answers from it."""
    from catid2_ray.evaluation.report import closing_table
    from catid2_ray.on_ray.commands import GateFailed, write_json

    console = _console()
    try:
        outcome = run(loaded)
    except GateFailed as error:
        console.print(closing_table({"release": "none", **error.figures}))
        console.print("FAILED", style="bold red")
        if json_file:
            write_json(json_file, {"release": None, **error.figures})
        raise
    if json_file:
        write_json(json_file, outcome.figures)
    if not outcome.made:
        console.print(f"Nothing changed: every stage was found committed in {loaded.store}.")
    console.print(closing_table(outcome.figures))
    store = Store(loaded.store)
    console.print(
        f"Release {outcome.release.name} is current: {store.uri_of(f'releases/{outcome.release.name}.json')}",
        soft_wrap=True,
    )
    queries = loaded.sample_queries or tuple(outcome.parts["evaluation"].metrics["sample_queries"])
    for query in queries:
        _answer(console, store, query, k=3)
    console.print(
        f"\nTry next:\n  catid2 search \"{queries[0]}\" --store {loaded.store}\n  catid2 serve --store {loaded.store}\n"
        "  curl -s localhost:8000/v1/retrieve -H 'content-type: application/json' "
        f"-d '{{\"query\": \"{queries[0]}\", \"k\": 5}}'",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _console(least_width: int = 0) -> Console:
    """For results: titles, ids, queries and paths are data, in which neither [markup] nor :emoji: means anything."""
    return Console(markup=False, emoji=False, width=max(least_width, Console().width) if least_width else None)


_OPEN: dict[str, object] = {}


def _answer(console: Console, store: Store, query: str, *, k: int, expression: dict | None = None) -> None:
    from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
    from catid2_ray.on_ray.machine.query_encoder import open_retriever

    release = releases.current(store)
    if release.name not in _OPEN:
        opened = open_retriever(releases.release_folder(store, release, releases.default_cache()))
        LiveUpdates(opened, LiveLog(store, release.name)).catch_up()
        _OPEN[release.name] = opened
    hits = _OPEN[release.name].retrieve([query], k=k, filters=[expression])[0]
    table = Table(title=f"“{query}”  ({release.name})", title_justify="left", box=None, pad_edge=False)
    # Scores that the release does not use get no column.
    scores = {"log P": "logp", "dense": "dense", "BM25": "lexical", "final": "score"}
    if all(hit.score == hit.logp for hit in hits):
        del scores["final"]
    scores = {name: field for name, field in scores.items() if any(getattr(hit, field) is not None for hit in hits)}
    for column in ("product", "ID", *scores, "title"):
        table.add_column(column, justify="right" if column in scores else "left", no_wrap=column != "title")
    for hit in hits:
        numbers = [f"{getattr(hit, field):.2f}" for field in scores.values()]
        table.add_row(hit.product_id, hit.docid_text, *numbers, hit.title or "")
    console.print()
    console.print(table)


KindsOption = Annotated[
    str, typer.Option("--kinds", help=f"comma-separated ways of making IDs: {', '.join(KINDS)}", metavar="A,B,…")
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="write the page here, not into the store")
]


@app.command("compare-ids")
def compare_ids(
    recipe: RecipeOption,
    kinds: KindsOption = "tiger,cat_id2,cat_id2_shuffled",
    seeds: Annotated[int, typer.Option(help="runs of each kind, from the recipe's seed on")] = 1,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Train and assign several ways of making IDs on equal budgets, each cached, and show them side by side."""
    from catid2_ray.evaluation.pages import compare_page, compare_table
    from catid2_ray.on_ray.commands import write_json
    from catid2_ray.on_ray.reports import compare_ids as run

    loaded = Recipe.load(recipe, overrides or [])
    found = run(loaded, [kind.strip() for kind in kinds.split(",") if kind.strip()], seeds)
    if json_file:
        write_json(json_file, found.rows)
    about = {
        "catalogue": f"{found.catalog.rows:,} products, categories by depth {found.catalog.metrics['categories']}",
        "embedding": f"{loaded.embedding.encoder} of {', '.join(loaded.embedding.text)}",
        "budget": ", ".join(f"{name} {getattr(loaded.quantizer, name)}" for name in _BUDGET),
    }
    page = compare_page(found.rows, title=f"IDs compared: {loaded.name}", about=about)
    _console(112).print(compare_table(found.rows))
    print(f"The page with pictures and every run: {_keep_page(page, html_file, loaded, 'compare_ids.html')}")


_BUDGET = ("epochs", "batch", "learning_rate", "hidden", "latent", "codes_per_level")


def _keep_page(page: str, html_file: str | None, recipe: Recipe, name: str) -> str:
    """Write the page where asked, else into the store, which a job on a cluster leaves behind; returns where it is."""
    if html_file:
        Path(html_file).write_text(page, encoding="utf-8")
        return html_file
    store = Store(recipe.store)
    store.write(f"reports/{name}", page.encode())
    return store.uri_of(f"reports/{name}")


@app.command("report-ids")
def report_ids(
    recipe: RecipeOption,
    overrides: SetOption = None,
    beside: Annotated[
        str | None, typer.Option(help="a kind whose IDs, made by compare-ids, stand beside in the table of titles")
    ] = None,
    html_file: HtmlOption = None,
) -> None:
    """Draw the quality of a recipe's IDs, which must be assigned already, as one page."""
    from catid2_ray.on_ray.reports import ids_report

    loaded = Recipe.load(recipe, overrides or [])
    page = ids_report(loaded, beside=beside)
    print(f"ID quality report: {_keep_page(page, html_file, loaded, f'ids_{loaded.quantizer.kind}.html')}")


@app.command()
def align(recipe: RecipeOption, overrides: SetOption = None, html_file: HtmlOption = None) -> None:
    """Align the trained generator of a recipe by reinforcement; show what it did, and draw it as one page."""
    import json

    from catid2_ray.evaluation.alignment import alignment_page, alignment_table
    from catid2_ray.on_ray.commands import run_verb

    loaded = Recipe.load(recipe, overrides or [])
    store, made = run_verb(loaded, "align_generator")
    history = json.loads(store.read(made.file("history.json")))
    _console(112).print(alignment_table(made.metrics["before"], made.metrics["after"]))
    page = alignment_page(history, title=f"Alignment: {loaded.name}", about=loaded.alignment.identity())
    print(f"The page with pictures: {_keep_page(page, html_file, loaded, 'alignment.html')}")
    print(store.uri_of(made.name))


@app.command()
def search(
    query: str,
    store: StoreOption = _DEFAULT_STORE,
    k: Annotated[int, typer.Option(help="products to return")] = 10,
    filter_json: Annotated[
        str | None, typer.Option("--filter", metavar="JSON", help='such as \'{"column": "price", "to": 20}\'')
    ] = None,
) -> None:
    """Answer one query from the current release, with the changes made to it since, in this process."""
    from catid2_ray.errors import QueryError

    try:
        expression = None if filter_json is None else json.loads(filter_json)
    except ValueError as error:
        raise QueryError(f"--filter is not JSON ({error}): {filter_json}") from None
    opened = Store(store)
    opened.check()
    _answer(_console(), opened, query, k=k, expression=expression)


@app.command()
def serve(
    store: StoreOption = _DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
) -> None:
    """Serve the current release over HTTP on this machine until interrupted (POST /v1/retrieve, GET /healthz)."""
    from catid2_ray.on_ray.serve.app import serve_here

    serve_here(store, host=host, port=port)


@app.command()
def evaluate(
    pairs: Annotated[str, typer.Option(help="parquet file of pairs: query_id, query, product_id, relevance, split")],
    store: StoreOption = _DEFAULT_STORE,
    split: Annotated[str, typer.Option(help="rows of this split are scored")] = "test",
    min_relevance: Annotated[float, typer.Option(help="from here on a product counts as relevant")] = 2.67,
    methods: Annotated[
        str,
        typer.Option(help="comma-separated: beam (alone), bm25, dense (the vectors alone), served (what serving says)"),
    ] = "beam,bm25",
    json_file: JsonOption = None,
) -> None:
    """Score the current release of a store on a table of pairs."""
    from catid2_ray.evaluation.report import closing_table
    from catid2_ray.on_ray.commands import evaluate_release, write_json
    from catid2_ray.on_ray.stages.evaluate import METHODS

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    if unknown := set(names) - set(METHODS):
        raise InputError(f"--methods: unknown {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    figures = evaluate_release(store, pairs, split=split, min_relevance=min_relevance, methods=names)
    if json_file:
        write_json(json_file, figures)
    _console().print(closing_table(figures))


@app.command("prepare-esci")
def prepare_esci(
    source: Annotated[str, typer.Option(help="folder or s3:// prefix with the two published parquet files")],
    categories: Annotated[
        str, typer.Option(help="JSON lines in the manner of ESCI-S (asin, category, locale), plain, .gz or .zst")
    ],
    locale: Annotated[str, typer.Option(help="us, es or jp")],
    out: Annotated[str, typer.Option(help="folder or s3:// prefix to write; then a recipe's catalog.root")],
    version: Annotated[str, typer.Option(help="small (without easy queries) or large")] = "small",
    corpus: Annotated[
        str, typer.Option(help="judged = products that a judgement names; all = of the locale")
    ] = "judged",
    validation: Annotated[float, typer.Option(help="share of the training queries that validate")] = 0.02,
    seed: Annotated[int, typer.Option(help="seed of that choice")] = 0,
    keep_unseen: Annotated[
        bool, typer.Option("--keep-unseen", help="keep test products that no training pair names, unlike the paper")
    ] = False,
) -> None:
    """Turn the published ESCI files into products and pairs by the paper's rules, with its Table 1 beside our counts."""
    from catid2_ray.evaluation.report import rich_tables
    from catid2_ray.evaluation.table_one import NOTE
    from catid2_ray.on_ray.stages.prepare_esci import prepare_esci as run

    done = run(
        source, categories, out, locale=locale, version=version, corpus=corpus, validation=validation, seed=seed,
        keep_unseen=keep_unseen,
    )  # fmt: skip
    console = _console()
    console.print(rich_tables(done.sections))
    console.print(NOTE, highlight=False)
    if not done.made:
        console.print(f"Nothing changed: {done.root} holds this preparation already.", soft_wrap=True)
    console.print(
        f"\nTry next:\n  catid2 reindex --recipe jobs/recipes/esci_{locale}.yaml --set catalog.root={done.root} --set store=STORE",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


@app.command()
def recipe(
    show_schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of recipes (the default)")
    ] = False,
    path: Annotated[str | None, typer.Option("--recipe", help="print this recipe with every default resolved")] = None,
    overrides: SetOption = None,
) -> None:
    """Print the schema of recipes, or a recipe with all its defaults."""
    if path:
        print(Recipe.load(path, overrides or []).to_yaml(), end="")
    else:
        print(schema())


def main() -> None:
    guarded(app)


def run_compare_ids() -> None:
    """Entry point of `python -m jobs.compare_ids`."""
    guarded(lambda: typer.run(compare_ids))


def run_prepare_esci() -> None:
    """Entry point of `python -m jobs.prepare_esci`."""
    guarded(lambda: typer.run(prepare_esci))


def run_reindex() -> None:
    """Entry point of `python -m jobs.reindex`."""
    guarded(lambda: typer.run(reindex))


def run_append() -> None:
    """Entry point of `python -m jobs.append_items`."""
    guarded(lambda: typer.run(append))


if __name__ == "__main__":
    main()
