"""Commands on the releases of a store: list them, go back, try one, promote it, clean up."""

import json
from pathlib import Path
from typing import Annotated

import typer

from catid2_ray.artifacts import history, lease, trials
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.cli.options import (
    DEFAULT_STORE,
    JsonOption,
    ShadowOption,
    StoreOption,
    WaitOption,
    console,
    event,
    say_younger,
)
from catid2_ray.errors import InputError


def shares_of(percent: float | None, shadow: float) -> Shares | None:
    """None where no trial is asked for."""
    if percent is None and shadow:
        raise InputError(
            "--shadow needs --trial: give the share of the sessions that the release on trial answers, 0 for none"
        )
    return None if percent is None else Shares(percent, shadow).check()


def said(release: str, shares: Shares) -> str:
    percent, shadow = shares
    return (
        f"Release {release} is on trial: {percent:g} % of the sessions, and {shadow:g} % of the others ask it beside."
    )


def trial(
    release: Annotated[str | None, typer.Argument(help="a stored release; left out: say what is on trial")] = None,
    percent: Annotated[float, typer.Option(help="share of the sessions that are answered from it")] = 0.0,
    shadow: ShadowOption = 0.0,
    end: Annotated[bool, typer.Option("--end", help="end the trial; the current release answers all")] = False,
    store: StoreOption = DEFAULT_STORE,
    wait: WaitOption = False,
) -> None:
    """Try a release on a share of the traffic, or say what is tried. Replicas follow within seconds."""
    if release is not None and end:
        raise InputError("--end ends the trial of now, whatever it is of; leave the release out")
    opened = Store(store)
    opened.check()
    if release is None and not end:
        found = trials.running(opened)
        print("No release is on trial." if found is None else said(found.release, found.shares))
        return
    with lease.holding(opened, wait=wait, command="catid2 trial", say=event):
        if end:
            ended = trials.end(opened)
            print("No release is on trial." if ended is None else f"The trial of release {ended.release} is over.")
        else:
            begun = trials.begin(opened, release, Shares(percent, shadow))
            print(said(begun.release, begun.shares))


def promote(store: StoreOption = DEFAULT_STORE, wait: WaitOption = False) -> None:
    """Make the release on trial current. Replicas that tried it have it open, and change to it without loading."""
    opened = Store(store)
    opened.check()
    with lease.holding(opened, wait=wait, command="catid2 promote", say=event):
        found = trials.promote(opened)
    say_younger(history.younger(opened, history.entries(opened), found.release))
    print(f"Release {found.release} is current.")


def list_releases(store: StoreOption = DEFAULT_STORE, json_file: JsonOption = None) -> None:
    """List the releases of a store, newest first: age, documents, recall@50, churn, size, and which is current or in use."""
    from catid2_ray.artifacts.history import overview
    from catid2_ray.evaluation.report import releases_table
    from catid2_ray.evaluation.tables import terminal

    opened = Store(store)
    opened.check()
    rows = overview(opened)
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        print(f"Nothing was published to {opened.uri} yet.")
        return
    console().print(terminal([releases_table(rows)]))
    for row in rows:
        if row["problem"]:
            print(f"{row['release']} cannot be read: {row['problem']}")


def rollback(
    release: Annotated[str | None, typer.Argument(help="its name; left out: the one before the current one")] = None,
    store: StoreOption = DEFAULT_STORE,
    wait: WaitOption = False,
) -> None:
    """Make an earlier release current again, after a look whether all of its parts are there."""
    opened = Store(store)
    opened.check()
    with lease.holding(opened, wait=wait, command="catid2 rollback", say=event):
        back = history.rollback(opened, release)
    if back.before == back.release.name:
        print(f"Release {back.release.name} is current already; nothing changed.")
        return
    say_younger(history.younger(opened, history.entries(opened), back.release.name))
    print(
        f"Release {back.release.name} is current again; it was {back.before}. Replicas that follow the store change over within "
        "seconds; what is made next builds on the release that is current."
    )


def gc(
    store: StoreOption = DEFAULT_STORE,
    keep: Annotated[
        int, typer.Option(help="releases that stay: the last that were current; those in use stay anyway")
    ] = ...,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="remove nothing, say what would go")] = False,
    runs_older_than: Annotated[
        float, typer.Option(metavar="DAYS", help="checkpoints of trainings that nobody went on with for so long go too")
    ] = 7,
) -> None:
    """Remove artefacts that no kept release names (also of compare-ids and of a chain not published yet), what killed jobs left,
    and what this machine fetched of it."""
    from catid2_ray.artifacts.gc import collect
    from catid2_ray.evaluation.report import freed_table, size_text
    from catid2_ray.evaluation.tables import terminal

    opened = Store(store)
    opened.check()
    freed = collect(
        opened,
        keep=keep,
        dry_run=dry_run,
        runs_older_than_days=runs_older_than,
        cache=releases.default_cache(),
        say=event,
    )
    if freed.rows:
        console().print(terminal([freed_table(freed.rows, dry_run=dry_run)]))
    for uri in freed.unread:
        print(f"Left alone, as this version cannot read it: {uri}")
    print(f"{'Would free' if dry_run else 'Freed'} {size_text(freed.bytes)}. Releases kept: {', '.join(freed.kept)}")


COMMANDS = {"releases": list_releases, "rollback": rollback, "trial": trial, "promote": promote, "gc": gc}
