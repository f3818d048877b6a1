"""Commands on the releases of a store: list them, go back, try one, promote it, clean up."""

import contextlib
from typing import Annotated

import typer

from catid2_ray.artifacts import history, holder, lease, trials, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.cli.options import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    WaitOption,
    console,
    event,
    json_writer,
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
    percent: Annotated[
        float | None, typer.Option(help="share of the sessions that are answered from it; left out: as it was, or 0")
    ] = None,
    shadow: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="share of the others that ask it beside; left out: as it was, or 0"),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="end the trial; the current release answers all")] = False,
    store: StoreOption = DEFAULT_STORE,
    wait: WaitOption = False,
) -> None:
    """Try a release on a share of the traffic, or say what is tried. Replicas follow within seconds."""
    shares = {name: value for name, value in (("percent", percent), ("shadow", shadow)) if value is not None}
    if release is not None and end:
        raise InputError("--end ends the trial of now, whatever it is of; leave the release out")
    if shares and release is None:
        raise InputError(f"--{next(iter(shares))} is of a release: name the one to try")
    opened = Store(store)
    opened.check()
    if release is None and not end:
        found = trials.running(opened)
        print("No release is on trial." if found is None else said(found.release, found.shares))
        return
    if end:
        with _beside(opened, "catid2 trial", wait=wait):
            ended = trials.end(opened)
        print("No release is on trial." if ended is None else f"The trial of release {ended.release} is over.")
    else:
        with lease.holding(opened, wait=wait, command="catid2 trial", say=event):
            now = trials.running(opened)
            begins = now is None or now.release != release
            if begins and not any(shares.values()):
                raise InputError(f"a trial of {release} needs a share of the sessions: --percent 5, or --shadow 20")
            begun = trials.begin(opened, release, (Shares(0.0) if begins else now.shares)._replace(**shares))
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
    write = json_writer(json_file, submitted=False)
    rows = overview(opened)
    write(rows)
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
    with _beside(opened, "catid2 rollback", wait=wait):
        back = history.rollback(opened, release)
        at_work = lease.look(opened)
    if back.before == back.release.name:
        print(f"Release {back.release.name} is current already; nothing changed.")
        return
    say_younger(history.younger(opened, history.entries(opened), back.release.name))
    print(
        f"Release {back.release.name} is current again; it was {back.before}. Replicas that follow the store change over within "
        "seconds; what is made next builds on the release that is current."
    )
    if not (wait or at_work.is_free):
        print(
            f"At work beside: {holder.sentence(at_work.record)}. A job that began before this cannot publish what it makes; run it "
            "again when it has ended, and it goes on from what is committed."
        )


def _beside(store: Store, command: str, *, wait: bool) -> contextlib.AbstractContextManager:
    """For what cannot wait hours for a job: as another reader of the store, whom a gc sees and who waits for a gc. Its records are
    created, never written over, so that of two at one moment one is refused. With `wait`: after the job's end."""
    if wait:
        return lease.holding(store, wait=True, command=command, say=event)
    return uses.job(store, command=command, say=event)


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
