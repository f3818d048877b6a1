"""What commands have in common: their options, the console that they write results to, and log lines."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import InputError
from catid2_ray.redaction import redacted

RecipeOption = Annotated[str, typer.Option("--recipe", help="YAML recipe, such as jobs/recipes/quickstart.yaml")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a recipe field; repeatable")
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="write the figures to this file, or s3:// object")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="wait while another job works on the store, not exit 9")]
StoreOption = Annotated[str, typer.Option("--store", envvar="CATID2_STORE", help="folder or s3:// prefix of the store")]
TrialOption = Annotated[
    float | None,
    typer.Option(
        "--trial", metavar="PERCENT", help="do not publish: put the release on trial, with this share of the sessions"
    ),
]
ShadowOption = Annotated[
    float,
    typer.Option("--shadow", metavar="PERCENT", help="share of the other sessions that ask it beside, for metrics"),
]
DEFAULT_STORE = "catid2_store"


def console(least_width: int = 0) -> Console:
    """For results: titles, ids, queries and paths are data, in which neither [markup] nor :emoji: means anything."""
    return Console(markup=False, emoji=False, width=max(least_width, Console().width) if least_width else None)


def event(name: str, **values) -> None:
    """`progress.event`, without the second that importing Ray takes."""
    line = " ".join([f"event={name}", *(f"{key}={value}" for key, value in values.items())])
    print(redacted(line), file=sys.stderr, flush=True)


def json_writer(path: str | None, *, submitted: bool = True) -> Callable[[dict | list], None]:
    """What writes figures to a file, or an object of s3://; nothing where no path is given. To be called before the work, whose
    figures and exit code would be lost with it: InputError for a place that cannot be written. `submitted`: of a command that may
    be a submitted job, in a folder that Ray deletes."""
    if path is None:
        return lambda figures: None
    folder, _, name = path.rpartition("/")
    if "://" in path:
        store = Store(folder)
        store.check()
        return lambda figures: store.write(name, _json(figures))
    if submitted and os.environ.get("RAY_ADDRESS") and not os.path.isabs(path):
        raise InputError(
            f"--json {path}: where RAY_ADDRESS is set, as in a submitted job, the working directory may be a copy that is deleted "
            "afterwards: name an absolute path that outlives it, or s3://…"
        )
    place = path if os.path.exists(path) else folder or ("/" if path.startswith("/") else ".")
    if not path or os.path.isdir(path) or not os.access(place, os.W_OK):
        raise InputError(f"--json {path}: no file can be written there: name one in a folder that exists")
    return lambda figures: Path(path).write_bytes(_json(figures)) and None


def _json(figures: dict | list) -> bytes:
    return (json.dumps(figures, indent=1, ensure_ascii=False) + "\n").encode()


def say_younger(changes: int) -> None:
    if changes:
        print(
            f"Live changes of products that are younger than its catalogue: {changes:,}. The service carries over what it lacks "
            "of them."
        )
