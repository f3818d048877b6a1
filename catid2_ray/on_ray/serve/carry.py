"""Changes outlive a swap: live changes that are younger than a release's catalogue are carried over from the releases before.

Which they are, the moves of the pointer say (`artifacts.history.sources`), by numbers, not by clocks. They are written into the
release's own series, many to a record, each as a change that names the one that it came `of`: release and number where it was
made first. So all replicas carry at once, and end with one series in one order; and a change that went from release to release
is taken once. What cannot be carried is written as "skipped" with the reason, so that it is said and counted and never tried
again. Of a product that has changed since, on this release or by what was carried before, an older change that comes late is
left out: when each was made, its record says.
"""

from collections.abc import Callable
from typing import NamedTuple

from catid2_ray.artifacts import history, trials
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates, Touched, changes_of, check, origin
from catid2_ray.on_ray.serve.newcomers import Newcomers, asked_again
from catid2_ray.on_ray.serve.puts import Puts, standing

MOST = 1000  # changes, and about so many products, of one record


class Carried(NamedTuple):
    """Changes that this replica wrote: those that took effect, and those of which nothing could be carried."""

    count: int = 0
    skipped: int = 0

    def plus(self, other: "Carried") -> "Carried":
        return Carried(self.count + other.count, self.skipped + other.skipped)


class _Change(NamedTuple):
    """A change that may be carried: the release whose record it is, release and number where it was made first, and itself."""

    source: str
    of: tuple[str, int]
    record: dict

    @property
    def products(self) -> int:
        return max(1, len(self.record["products"]) + len(self.record.get("changed", ())))


class Carrier:
    """Carries changes over to the release that `updates` keeps. Several replicas may do so at once."""

    def __init__(self, store: Store, updates: LiveUpdates, newcomers: Newcomers):
        self.store, self.updates, self.newcomers, self.release = store, updates, newcomers, updates.log.release
        self._seen: dict[str, int] = {}
        self._at: dict[str, int] = {}  # source → its last change that was looked at
        self._left: set[str] = set()
        self._watched: set[str] = set()
        self._quantizers: dict[str, str | None] = {}

    def carry(self) -> Carried:
        """Carry all that is known now: before the release is served, and when the pointer moved back to it. Raises StorageError."""
        moves = trials.moves(self.store, self.release)
        self._seen = dict.fromkeys(sorted(self._watched), 0) | history.sources(moves, self.release)
        # The release that was left is served by some replicas a while longer.
        lately = [move for move in moves if move.release == self.release and move.after]
        self._left = {lately[0].after.release, lately[-1].after.release} & self._seen.keys() if lately else set()
        self._left |= self._watched
        return self._from(self._seen)

    def late(self) -> Carried:
        """Carry what came meanwhile to the release that was left: one request where nothing did. For followers."""
        return self._from({name: self._seen[name] for name in self._left})

    def watch(self, release: str) -> None:
        """From now on `late` carries the changes of this release, too: it was served after this one, so that a way back finds them
        here already."""
        if release != self.release:
            self._watched.add(release)
            self._seen = {release: 0} | self._seen
            self._left = self._left | {release}

    def _from(self, sources: dict[str, int]) -> Carried:
        total = Carried()
        for source, seen in sources.items():
            start, done = max(seen, self._at.get(source, 0)), Carried()
            while (source, start + 1) in self.updates.carried:  # known from the series: need not be read again
                start += 1
            waiting: list[_Change] = []
            for number, record in enumerate(LiveLog(self.store, source).after(start), start + 1):
                waiting += [one for change in changes_of(record) if (one := self._missing(source, number, change))]
                if sum(one.products for one in waiting) >= MOST:
                    done, waiting = done.plus(self._write(waiting)), []
                if not waiting:
                    self._at[source] = number
            if waiting:
                done = done.plus(self._write(waiting))
                self._at[source] = number
            if done != Carried():
                progress.event(
                    "live_changes_carried", release=self.release, of=source, changes=done.count, skipped=done.skipped
                )
            total = total.plus(done)
        return total

    def _missing(self, source: str, number: int, record: dict) -> _Change | None:
        """None for a change that this release has, or that its catalogue may have seen, and for one that took no effect."""
        of = origin(record) if "of" in record else (source, number)
        if of[0] == self.release or of in self.updates.carried or of[1] <= self._seen.get(of[0], 0):
            return None
        if "of" in record and (record["kind"] in ("skipped", "put") or "left_out" in record):
            # What the source could not take of it, this release may.
            source, record = of[0], LiveLog(self.store, of[0]).find(of[1]) or record
        return None if record["kind"] == "skipped" else _Change(source, of, record)

    def _write(self, changes: list[_Change]) -> Carried:
        written = self.updates.change_many(lambda trial: self._fitted(trial, changes))
        skipped = sum(one["kind"] == "skipped" for one in written)
        return Carried(len(written) - skipped, skipped)

    def _fitted(self, trial: LiveUpdates, changes: list[_Change]) -> list[dict]:
        """The changes as they fit the release one after the other, without those that another replica carried."""
        fitting, made = _Fitting(trial, self.newcomers, self._quantizer), []
        for one in changes:
            if one.of not in trial.carried:
                made.append(fitting.fitted(one))
                trial.take(made[-1])
        return made

    def _quantizer(self, release: str) -> str | None:
        """The digest of a release's quantizer, None where the release is gone."""
        if release not in self._quantizers:
            try:
                self._quantizers[release] = releases.load(self.store, release).parts["quantizer"]["digest"]
            except ArtifactError:
                self._quantizers[release] = None
        return self._quantizers[release]


class _Fitting:
    """Makes changes of other releases fit the one that `updates` keeps, as it is now. `quantizer`: release → its digest."""

    def __init__(self, updates: LiveUpdates, newcomers: Newcomers, quantizer: Callable[[str], str | None]):
        self.updates, self.newcomers, self.quantizer = updates, newcomers, quantizer
        self.release, self.puts = updates.log.release, Puts(updates, newcomers)

    def fitted(self, change: _Change) -> dict:
        source, record = change.source, change.record
        left_out: dict[str, str] = {}
        suited = {"insert": self._inserts, "put": self._puts, "withdraw": self._withdraws, "restore": self._restores}
        candidates, make = suited[record["kind"]](source, record, left_out)
        if (at := record.get("at")) is not None:
            late = [one for one in candidates if self._is_late(one, record["kind"], at)]
            left_out |= dict.fromkeys(map(_name, late), f"it has changed in release {self.release} since")
            candidates = [one for one in candidates if _name(one) not in left_out]
        changed = self._most(candidates, make, left_out)
        if changed is None:
            changed = {"kind": "skipped", "products": [], "why": "; ".join(sorted(set(left_out.values())))}
        return changed | {"of": list(change.of), "at": at} | ({"left_out": left_out} if left_out else {})

    def _is_late(self, candidate: str | dict, kind: str, at: float) -> bool:
        """Whether something younger says what this change says: of a withdrawal, whether the product can be found; of a price,
        what it costs. So a price that came later keeps no product from being withdrawn."""
        last = self.updates.touched.get(_name(candidate), Touched())
        if kind in ("withdraw", "restore"):
            return last.live > at
        in_place = kind == "put" and "title" not in candidate
        return last.content > at or (last.live > at and not in_place)

    def _most(self, candidates: list, make: Callable[[list], dict], left_out: dict[str, str]) -> dict | None:
        """The change that `make` makes of as many of the candidates as fit together, None where none does; the others, by name,
        with the reason, in `left_out`."""
        kept, made = [], None

        def add(more: list) -> None:
            nonlocal kept, made
            try:
                changed = make([*kept, *more])
                check(self.updates.retriever, changed)
            except InputError as error:
                if len(more) == 1:
                    left_out[_name(more[0])] = str(error)
                else:
                    add(more[: len(more) // 2])
                    add(more[len(more) // 2 :])
            else:
                kept, made = [*kept, *more], changed

        if candidates:
            add(candidates)
        return made

    def _inserts(self, source: str, record: dict, left_out: dict[str, str]) -> tuple[list, Callable]:
        """Those that the release lacks, made by its own encoder and quantizer."""
        retriever, candidates = self.updates.retriever, []
        for one in record["products"]:
            if self._is(one["product_id"]):
                left_out[one["product_id"]] = f"release {self.release} has it"
            else:
                candidates.append(one)

        def make(chosen: list[dict]) -> dict:
            asked, vectors = list(map(asked_again, chosen)), retriever.products.base_vectors is not None
            made = self.newcomers.prepare(asked, retriever.live.view, vectors=vectors, keeps=self._kept(source, chosen))
            return {"kind": "insert", "products": made}

        return candidates, make

    def _kept(self, source: str, products: list[dict]) -> dict[str, str]:
        """Product → ID that it has on the source, where that is of the same quantizer and free here."""
        if self.quantizer(source) != self.newcomers.parts["quantizer"].digest:
            return {}
        view, pairs = self.updates.retriever.live.view, [(one["product_id"], one["docid"]) for one in products]
        return {name: docid for name, docid in pairs if self.newcomers.may_have(docid, name, view)}

    def _puts(self, source: str, record: dict, left_out: dict[str, str]) -> tuple[list, Callable]:
        """What was put, put again. What was new on the source, and is in this release's catalogue, changes only columns and value;
        so does what changed in place."""
        did = {one["product_id"]: one["did"] for one in record["answer"]}
        in_place = list(record["changed"])
        candidates, new = [], []
        for one in record["products"]:
            if did[one["product_id"]] == "inserted" and self._is(one["product_id"]):
                in_place.append(asked_again(one))
            else:
                new.append(one)
                candidates.append(asked_again(one))
        for one in in_place:
            if not self._is(one["product_id"]):
                left_out[one["product_id"]] = f"it is not live in release {self.release}"
            elif not one.keys() & {"columns", "value"}:
                left_out[one["product_id"]] = f"release {self.release} has it"
            else:
                candidates.append({key: one[key] for key in ("product_id", "columns", "value") if key in one})
        # The caller's own words, so that the same content again is known here, too.
        said = {key: record[key] for key in ("key", "request") if key in record}

        def make(chosen: list[dict]) -> dict:
            changed = self.puts.record(chosen, keeps=self._kept(source, new))
            names = {one["product_id"] for one in chosen}
            content = {name: digests for name, digests in record["content"].items() if name in names}
            return changed | {"content": content} | said

        return candidates, make

    def _withdraws(self, source: str, record: dict, left_out: dict[str, str]) -> tuple[list, Callable]:
        names = record["products"]
        left_out |= {name: f"release {self.release} lacks it" for name in names if self._is(name) is None}
        return [name for name in names if name not in left_out], lambda kept: {"kind": "withdraw", "products": kept}

    def _restores(self, source: str, record: dict, left_out: dict[str, str]) -> tuple[list, Callable]:
        names, make = self._withdraws(source, record, left_out)
        return names, lambda kept: make(kept) | {"kind": "restore"}

    def _is(self, name: str) -> bool | None:
        """Whether a product is live; None where the release never had it."""
        row, live = standing(self.updates.retriever, name)
        return None if row is None else live


def _name(product: str | dict) -> str:
    return product if isinstance(product, str) else product["product_id"]
