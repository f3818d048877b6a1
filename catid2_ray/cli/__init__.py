"""`catid2 …`: the command line, thin over the same calls as jobs/.

Results go to standard output, progress and events to standard error. A deliberate error is one message and the exit code
of its class; anything else is a bug and keeps its traceback.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from catid2_ray.artifacts.store import Store
from catid2_ray.cli import look, stored
from catid2_ray.cli import reproduce as reproductions
from catid2_ray.cli.options import (
    DEFAULT_STORE,
    JsonOption,
    RecipeOption,
    SetOption,
    ShadowOption,
    StoreOption,
    TrialOption,
    WaitOption,
    json_writer,
    say_younger,
)
from catid2_ray.cli.options import console as _console
from catid2_ray.config import KINDS, Recipe, schema
from catid2_ray.errors import CatidError, InputError, Interrupted

if TYPE_CHECKING:
    from catid2_ray.generator.users import User

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Semantic IDs for a catalogue, a generator that learns them, and the search that serves them.",
)  # fmt: skip


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
def reindex(
    recipe: RecipeOption,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    wait: WaitOption = False,
    new_ledger: Annotated[
        bool,
        typer.Option(
            "--new-ledger", help="begin a ledger anew where the release's cannot go on; products may change their IDs"
        ),
    ] = False,
    refit_encoder: Annotated[
        bool, typer.Option("--refit-encoder", help="fit the text encoder anew (lsa) instead of keeping the release's")
    ] = False,
    refresh_adapter: Annotated[
        bool,
        typer.Option(
            "--refresh-adapter", help="learn the adapter anew from today's pairs; products may change their IDs"
        ),
    ] = False,
    refresh_encoder: Annotated[
        bool,
        typer.Option(
            "--refresh-encoder", help="tune the text encoder anew on today's pairs; products may change their IDs"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="make nothing: say which stages would be found and which made")
    ] = False,
    trial: TrialOption = None,
    shadow: ShadowOption = 0.0,
) -> None:
    """The main job: embed, train, assign unique IDs, train the generator, evaluate, publish. Continues where it was left."""
    from catid2_ray.on_ray.commands import reindex as run

    choices = {
        "new_ledger": new_ledger, "refit_encoder": refit_encoder, "refresh_adapter": refresh_adapter,
        "refresh_encoder": refresh_encoder,
    }  # fmt: skip
    loaded, shares = Recipe.load(recipe, overrides or []), stored.shares_of(trial, shadow)
    if dry_run:
        look.show_dry_run(loaded, choices, json_file)
        return
    _run_and_show(functools.partial(run, wait=wait, trial=shares, **choices), loaded, json_file)


@app.command()
def append(
    recipe: RecipeOption,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    wait: WaitOption = False,
    trial: TrialOption = None,
    shadow: ShadowOption = 0.0,
) -> None:
    """Today's catalogue under the published quantizer and generator: new products get free IDs, no published ID moves."""
    from catid2_ray.on_ray.commands import append_items as run

    shares = stored.shares_of(trial, shadow)
    _run_and_show(functools.partial(run, wait=wait, trial=shares), Recipe.load(recipe, overrides or []), json_file)


@app.command()
def publish(recipe: RecipeOption, overrides: SetOption = None, wait: WaitOption = False) -> None:
    """Make what the stages of this recipe have made the current release, if its recall and its canary queries are good enough."""
    from catid2_ray.on_ray.commands import publish as run

    store, release = run(Recipe.load(recipe, overrides or []), wait=wait)
    print(f"Release {release.name} is current in {store.uri}.")


def _run_and_show(run: Callable, loaded: Recipe, json_file: str | None) -> None:
    """Run to a published release, show its figures and a few answers from it."""
    from catid2_ray.evaluation.report import closing_tables
    from catid2_ray.evaluation.tables import terminal
    from catid2_ray.on_ray.commands import GateFailed

    console, write = _console(), json_writer(json_file)
    try:
        outcome = run(loaded)
    except GateFailed as error:
        console.print(terminal(closing_tables({"release": "none", **error.figures})))
        console.print("FAILED", style="bold red")
        write({"release": None, **error.figures})
        raise
    write(outcome.figures)
    if not outcome.made:
        console.print(f"Nothing changed: every stage was found committed in {loaded.store}.")
    console.print(terminal(closing_tables(outcome.figures)))
    store = Store(loaded.store)
    if outcome.trial is not None:
        print(stored.said(outcome.release.name, outcome.trial))
        say_younger(outcome.figures["changes_to_carry"])
        return
    console.print(
        f"Release {outcome.release.name} is current: {store.uri_of(f'releases/{outcome.release.name}.json')}",
        soft_wrap=True,
    )
    say_younger(outcome.figures["changes_to_carry"])
    queries = loaded.sample_queries or tuple(outcome.parts["evaluation"].metrics["sample_queries"])
    try:
        for query in queries:
            _answer(console, store, query, k=3)
    except CatidError as error:  # its encoder, say, is on the nodes that evaluated it and on those that will serve it
        print(f"Answers from it cannot be shown here: {error}")
    console.print(
        f"\nTry next:\n  catid2 search \"{queries[0]}\" --store {loaded.store}\n  catid2 serve --store {loaded.store}\n"
        "  curl -s localhost:8000/v1/retrieve -H 'content-type: application/json' "
        f"-d '{{\"query\": \"{queries[0]}\", \"k\": 5}}'",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _answer(
    console: Console, store: Store, query: str, *, k: int, expression: dict | None = None, user: "User | None" = None
) -> None:
    from catid2_ray.evaluation.tables import Column, Table, terminal

    retriever = look.current_retriever(store)
    hits = retriever.retrieve([query], k=k, filters=[expression], users=[user])[0]
    # Scores that the release does not use get no column.
    scores = {"log P": "logp", "dense": "dense", "BM25": "lexical", "final": "score"}
    if all(hit.score == hit.logp for hit in hits):
        del scores["final"]
    scores = {name: field for name, field in scores.items() if any(getattr(hit, field) is not None for hit in hits)}
    columns = [Column(name, number=False, whole=True) for name in ("product", "ID")]
    columns += [*map(Column, scores), Column("title", number=False)]
    rows = [
        [hit.product_id, hit.docid_text, *(f"{getattr(hit, field):.2f}" for field in scores.values()), hit.title or ""]
        for hit in hits
    ]
    console.print()
    console.print(terminal([Table(f"“{query}”  ({retriever.release})", columns, rows)]))
    if len(hits) < k:
        why = {
            "search": "the beams of this release hold no more (serving.beam_width, serving.expansion)",
            "catalogue": "there are no more" + (" that the filter allows" if expression else ""),
        }[retriever.why_fewer(len(hits), k=k, expression=expression)]
        console.print(f"{len(hits)} of the {k} products asked for: {why}.", soft_wrap=True, highlight=False)


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
    score: Annotated[
        str | None,
        typer.Option(metavar="recall", help="also train a small generator on each run's IDs: what do queries find?"),
    ] = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Train and assign several ways of making IDs on equal budgets, each cached, and show them side by side."""
    from catid2_ray.evaluation.ids_report import compare_page, compare_table
    from catid2_ray.evaluation.tables import terminal
    from catid2_ray.on_ray.reports import compare_ids as run

    write = json_writer(json_file)
    loaded = Recipe.load(recipe, overrides or [])
    comparison = run(loaded, [kind.strip() for kind in kinds.split(",") if kind.strip()], seeds, score=score)
    write(comparison.rows)
    about = {
        "catalogue": f"{comparison.catalog.rows:,} products, categories by depth {comparison.catalog.metrics['categories']}",
        "embedding": f"{loaded.embedding.encoder} of {', '.join(loaded.embedding.text)}",
        "budget": ", ".join(
            f"{name} {value}" for name in _BUDGET if (value := getattr(comparison.recipe.quantizer, name)) is not None
        ),
    }
    page = compare_page(comparison.rows, title=f"IDs compared: {loaded.name}", about=about)
    _console(112).print(terminal([compare_table(comparison.rows, brief=True)]))
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
def align(
    recipe: RecipeOption, overrides: SetOption = None, html_file: HtmlOption = None, wait: WaitOption = False
) -> None:
    """Align the trained generator of a recipe by reinforcement; show what it did, and draw it as one page."""
    from catid2_ray.evaluation.alignment_report import alignment_page, alignment_table
    from catid2_ray.evaluation.tables import terminal
    from catid2_ray.on_ray.commands import run_verb

    loaded = Recipe.load(recipe, overrides or [])
    store, manifest = run_verb(loaded, "align_generator", wait=wait)
    history = json.loads(store.read(manifest.file("history.json")))
    table = alignment_table(manifest.metrics["before"], manifest.metrics["after"])
    _console(112).print(terminal([table]))
    page = alignment_page(history, title=f"Alignment: {loaded.name}", about=loaded.alignment.identity())
    print(f"The page with pictures: {_keep_page(page, html_file, loaded, 'alignment.html')}")
    print(store.uri_of(manifest.name))


@app.command()
def search(
    query: str,
    store: StoreOption = DEFAULT_STORE,
    k: Annotated[int, typer.Option(help="products to return")] = 10,
    filter_json: Annotated[
        str | None, typer.Option("--filter", metavar="JSON", help='such as \'{"column": "price", "to": 20}\'')
    ] = None,
    user: Annotated[
        list[str] | None, typer.Option(help="an attribute of who asks; may be repeated. Needs generator.mix.user")
    ] = None,
    recent: Annotated[
        list[str] | None,
        typer.Option(metavar="PRODUCT", help="a product that they looked at; may be repeated, the latest last"),
    ] = None,
) -> None:
    """Answer one query from the current release, with the changes made to it since, in this process."""
    from catid2_ray.errors import QueryError
    from catid2_ray.generator.users import User

    try:
        expression = None if filter_json is None else json.loads(filter_json)
    except ValueError as error:
        raise QueryError(f"--filter is not JSON ({error}): {filter_json}") from None
    opened = Store(store)
    opened.check()
    asker = User(tuple(user or ()), tuple(recent or ())) if user or recent else None
    _answer(_console(), opened, query, k=k, expression=expression, user=asker)


@app.command()
def serve(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8000,
) -> None:
    """Serve the current release over HTTP on this machine until interrupted (POST /v1/retrieve, GET /healthz)."""
    from catid2_ray.on_ray.serve.app import serve_here

    serve_here(store, host=host, port=port)


@app.command()
def evaluate(
    pairs: Annotated[str, typer.Option(help="parquet file of pairs: query_id, query, product_id, relevance, split")],
    store: StoreOption = DEFAULT_STORE,
    split: Annotated[str, typer.Option(help="rows of this split are scored")] = "test",
    min_relevance: Annotated[float, typer.Option(help="from here on a product counts as relevant")] = 2.67,
    methods: Annotated[
        str,
        typer.Option(
            help="comma-separated: beam (alone), lookahead (node vectors too), bm25, dense (vectors), served (as serving says)"
        ),
    ] = "beam,bm25",
    json_file: JsonOption = None,
) -> None:
    """Score the current release of a store on a table of pairs."""
    from catid2_ray.evaluation.report import closing_tables
    from catid2_ray.evaluation.tables import terminal
    from catid2_ray.on_ray.commands import evaluate_release
    from catid2_ray.on_ray.stages.evaluate import METHODS

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    if unknown := set(names) - set(METHODS):
        raise InputError(f"--methods: unknown {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    write = json_writer(json_file)
    figures = evaluate_release(store, pairs, split=split, min_relevance=min_relevance, methods=names)
    write(figures)
    _console().print(terminal(closing_tables(figures)))


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
    from catid2_ray.evaluation.report import NOTE
    from catid2_ray.evaluation.tables import terminal
    from catid2_ray.on_ray.stages.prepare_esci import prepare_esci as run

    prepared = run(
        source, categories, out, locale=locale, version=version, corpus=corpus, validation=validation, seed=seed,
        keep_unseen=keep_unseen,
    )  # fmt: skip
    console = _console()
    console.print(terminal(prepared.tables))
    console.print(NOTE, highlight=False)
    if not prepared.made:
        console.print(f"Nothing changed: {prepared.root} holds this preparation already.", soft_wrap=True)
    console.print(
        f"\nTry next:\n  catid2 reindex --recipe jobs/recipes/esci_{locale}.yaml --set catalog.root={prepared.root} "
        "--set store=STORE",
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


for command in look.COMMANDS:
    app.command()(command)
for name, command in (stored.COMMANDS | reproductions.COMMANDS).items():
    app.command(name)(command)


def main() -> None:
    guarded(app)


def run_alone(command: Callable) -> None:
    """Entry point of `python -m jobs.…`: one command, its options at once."""
    guarded(lambda: typer.run(command))
