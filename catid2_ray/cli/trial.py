"""Commands for a release on trial: begin, change, look at, end, promote."""

from typing import Annotated

import typer

from catid2_ray.artifacts import history, lease, trials
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.cli.options import DEFAULT_STORE, ShadowOption, StoreOption, WaitOption, event, say_younger
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


COMMANDS = (trial, promote)
