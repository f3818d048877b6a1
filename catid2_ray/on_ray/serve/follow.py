"""From one release to the next while queries are answered: load beside, look at it, change one reference, keep the last.

A request takes `now` once and is answered from it whole. Loading happens in the follower's thread; what is refused is said once
and not tried again until something else becomes current, and what may pass (a store that does not answer, too little memory) is
tried again, less and less often. The release before is kept open, so that a rollback to it takes no loading. A release on trial is
open, too, and answers its share of the sessions.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from catid2_ray.artifacts import copies, history, trials, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.errors import ArtifactError, CatidError
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.canary import AnswersDiffer
from catid2_ray.on_ray.serve.opened import Opened, OutOfMemory
from catid2_ray.on_ray.serve.settings import AppSettings

_LONGEST_WAIT_S = 300.0
_TRIAL_AGAIN_S = 60.0


class Tried(NamedTuple):
    """A release on trial beside the one that is served."""

    opened: Opened
    shares: Shares

    def answers(self, session: str) -> bool:
        return self._drawn("answers", session) < self.shares.percent

    def shadows(self, session: str) -> bool:
        """Of a session that the current release answers."""
        return self._drawn("shadows", session) < self.shares.shadow

    def _drawn(self, what: str, session: str) -> float:
        """From 0 to 100, the same on every replica; another draw for another release."""
        said = f"{what}\n{self.opened.name}\n{session}".encode(errors="surrogatepass")
        return 100 * int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) / 2**64


class Serving:
    """What a replica serves: `now`, and `last`, what it served before (None: nothing). `refused`: the release that is current but
    not served, and why (None: there is none). `trial`: a release on trial, None where there is none; `trial_refused`: as `refused`.
    `swaps`: changes of release so far; `failures`: looks in a row that failed."""

    def __init__(self, store: Store, settings: AppSettings, *, open: Callable[..., Opened] = Opened):
        self.store, self.settings, self._open = store, settings, open
        self.last: Opened | None = None
        self.refused: tuple[str, str] | None = None
        self.trial: Tried | None = None
        self.trial_refused: tuple[str, str] | None = None
        self._trial_seen, self._trial_again = 0, 0.0  # the last record of trials that was tried; when it is tried again
        self._made_room: str | None = None  # what was `last` until a candidate needed its memory
        self._ended, self._seen, self.swaps, self.failures = threading.Event(), 0, 0, 0
        self.now = self._first() if settings.follows else self._opened(self._named(), checked=False)
        self.now.follow()
        if settings.follows:
            threading.Thread(target=self._follow, name="releases", daemon=True).start()

    def _named(self) -> str:
        return self.settings.release or releases.current(self.store).name

    def _opened(self, name: str, **options) -> Opened:
        return self._open(self.store, name, self.settings, **options)

    def _first(self) -> Opened:
        """The current release or, where it is refused and nobody serves it, the last before it that is not: what others still
        serve. Where there is none, answers that differ are better than none."""
        self._seen, name = releases.pointer(self.store)
        releases.current(self.store)  # says what to do where there is none
        others = uses.of_releases(self.store).get(name, 0)
        try:
            return self._opened(name)
        except CatidError as error:
            if error.transient or (others and not isinstance(error, AnswersDiffer)):
                raise
            first = error
        if not others:
            for earlier in reversed(history.path(history.entries(self.store))[:-1]):
                try:
                    opened = self._opened(earlier)
                except CatidError:
                    continue
                self._refuse(name, first)
                return opened
        if isinstance(first, AnswersDiffer):
            return self._opened(name, checked=False)
        raise first

    def look(self) -> bool:
        """Serve what is current now; returns whether anything became current. Raises where it may work later."""
        number, name = releases.pointer(self.store)
        if number == self._seen or name is None:
            return False
        if name == self.now.name:
            self.now.catch_up(waits=True)  # another was current for a while, and may have taken changes
        else:
            if self.trial is not None and self.trial.opened.name != name:
                self.end_trial()  # it is over, and the new release may need its memory
            try:
                self._change(name)
            except Exception as error:
                self._refuse(name, error)
                if not isinstance(error, CatidError) or error.transient:
                    raise
                self._seen = number
                return False
        self._seen, self.refused = number, None
        return True

    def look_at_trial(self) -> None:
        """Open the release that is on trial, take on its new shares, or end what was tried. One that cannot be opened now, for want
        of memory or of a part, is tried again after a minute, and delays no change of release."""
        try:
            trial = trials.running(self.store)
        except ArtifactError as error:  # a damaged record is no reason to follow releases more slowly
            self.trial_refused = "unknown", str(error)
            return
        if trial is None or trial.release == self.now.name:
            self.end_trial()
            return
        if self.trial is not None and self.trial.opened.name == trial.release:
            self.trial = self.trial._replace(shares=trial.shares)
            return
        again = trial.number == self._trial_seen
        if again and time.monotonic() < self._trial_again:
            return
        if not again:
            self.end_trial()
        self._trial_seen = trial.number
        try:
            opened = self._opened(trial.release, beside=True)
        except Exception as error:  # as in `look`: whatever a release holds
            if not again:
                progress.event("trial_refused", release=trial.release, reason=repr(f"{type(error).__name__}: {error}"))
            self.trial_refused = trial.release, str(error)
            for_good = isinstance(error, CatidError) and not error.transient
            self._trial_again = math.inf if for_good else time.monotonic() + _TRIAL_AGAIN_S
        else:
            self.trial_refused = None
            opened.follow()
            self.trial = Tried(opened, trial.shares)
            progress.event("tries", release=trial.release, percent=trial.shares.percent, shadow=trial.shares.shadow)

    def end_trial(self) -> None:
        tried, self.trial, self.trial_refused = self.trial, None, None
        if tried is not None:
            tried.opened.end()
            progress.event("trial_ended", release=tried.opened.name)

    def chosen(self, session: str) -> Opened:
        """The release that answers a session: always the same one while a trial lasts."""
        tried, now = self.trial, self.now
        return tried.opened if tried is not None and tried.answers(session) else now

    def _change(self, name: str) -> None:
        began, before, left = time.monotonic(), self.now, False
        if self.last is not None and self.last.name == name:
            new = self.last
            new.catch_up(waits=True)
        else:
            if self.trial is not None and self.trial.opened.name == name:  # promoted: it is open already
                new = self.trial.opened
                new.catch_up(waits=True)
            else:
                new = self._candidate(name)
                new.follow()
            if self.last is not None:
                self.last.end()
                left = True
        self.now, self.last, self._made_room = new, before, None
        if self.trial is not None and self.trial.opened is new:
            self.trial = None
        before.carrier.watch(name)
        self.swaps += 1
        progress.event("serves", release=name, before=before.name, seconds=f"{time.monotonic() - began:.1f}")
        if left:
            self._forget()

    def _forget(self) -> None:
        """Make room on this node's disk: each release that is served is copied there."""
        try:
            held = [one.name for one in (self.now, self.last, self.trial and self.trial.opened) if one is not None]
            if freed := copies.forget(self.store, releases.default_cache(), serves=held):
                progress.event("copies_removed", bytes=freed)
        except (CatidError, OSError) as error:  # it is tried again after the next change
            progress.event("copies_not_removed", reason=repr(f"{type(error).__name__}: {error}"))

    def _candidate(self, name: str) -> Opened:
        """A release beside `now` and `last`, so that one which is refused costs no way back. Where three do not fit the memory,
        `last` makes room, and is opened again once the candidate is refused for good."""
        try:
            return self._opened(name, beside=True)
        except OutOfMemory:
            if self.last is None:
                raise
        except CatidError as error:
            self._take_back(error)
            raise
        self.last.end()
        self.last, self._made_room = None, self.last.name
        try:
            return self._opened(name, beside=True)
        except CatidError as error:
            self._take_back(error)
            raise

    def _take_back(self, error: CatidError) -> None:
        """Open the release that made room for a candidate, where `error` says that this one will not be tried again."""
        if self._made_room is None or error.transient:
            return
        name, self._made_room = self._made_room, None
        try:
            self.last = self._opened(name, beside=True)
            self.last.follow()
            self.last.carrier.watch(self.now.name)
        except CatidError as other:
            self.last = None
            progress.event("way_back_lost", release=name, reason=repr(f"{type(other).__name__}: {other}"))

    def _refuse(self, name: str, error: Exception) -> None:
        if self.refused is None or self.refused[0] != name:
            progress.event("release_refused", release=name, reason=repr(f"{type(error).__name__}: {error}"))
        self.refused = name, str(error)

    def _follow(self) -> None:
        while not self._ended.wait(min(self.settings.follow_s * 2**self.failures, _LONGEST_WAIT_S)):
            try:
                self.look()
                self.look_at_trial()
                self.failures = 0
            except Exception as error:  # this thread must outlive whatever a store or a release holds
                if self.failures == 0:
                    progress.event("releases_not_followed", reason=repr(f"{type(error).__name__}: {error}"))
                self.failures = min(self.failures + 1, 30)

    def end(self) -> None:
        self._ended.set()
        for one in (self.now, self.last, self.trial and self.trial.opened):
            if one is not None:
                one.end()
