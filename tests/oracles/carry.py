"""Live changes across releases, by a clock: a release holds every change that is younger than its catalogue.

A slow model: per release a dict of its products, whether each is live and its price, and every change with the time at which it
was made. A change goes on from release to release in the order of the release that it comes from, whole, whatever that could take;
but a product that has changed later stays as it is.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """`kind`: insert, put (with a text of its own), price (in place), withdraw or restore."""

    made: int
    release: str
    kind: str
    names: tuple[str, ...]
    price: int | None = None
    inserted: frozenset[str] = frozenset()  # products that were not live where it was made


@dataclass
class Release:
    """`read`: when its catalogue was read; `price`: of all products that it ever had."""

    read: int
    price: dict[str, int | None]
    live: set[str] = field(default_factory=set)
    series: list[Change] = field(default_factory=list)
    said_live: dict[str, int] = field(default_factory=dict)
    said_what: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.live = set(self.price)

    def fits(self, change):
        if change.kind == "insert":
            return not self.live & set(change.names)
        if change.kind == "put":
            return True
        return all(name in (self.live if change.kind == "price" else self.price) for name in change.names)

    def take(self, change):
        for name in change.names:
            is_live, is_known, what = name in self.live, name in self.price, change.kind in ("insert", "put", "price")
            in_place = change.kind == "price" or (change.kind == "put" and is_live and name in change.inserted)
            impossible = {"insert": is_live, "put": False, "price": not is_live}.get(change.kind, not is_known)
            late = (not in_place and self.said_live.get(name, 0) > change.made) or (
                what and self.said_what.get(name, 0) > change.made
            )
            if impossible or late:
                continue
            if what:
                self.said_what[name], self.price[name] = change.made, None if change.kind == "insert" else change.price
            if not in_place:
                self.said_live[name] = change.made
                self.live.discard(name) if change.kind == "withdraw" else self.live.add(name)
        self.series.append(change)

    @property
    def prices(self):
        return {name: self.price[name] for name in self.live}


class World:
    def __init__(self):
        self.clock, self.releases, self.moves = 0, {}, []

    def publish(self, name, catalogue, read):
        self.releases[name] = Release(read, dict.fromkeys(catalogue, 1))
        self.moves.append(name)

    def roll_back(self, name):
        self.moves.append(name)

    def change(self, release, kind, names, price=None):
        """Made on a release itself. False where it does not fit, which changes nothing."""
        inserted = frozenset(names) - self.releases[release].live
        change = Change(self.clock + 1, release, kind, tuple(names), price, inserted)
        if not self.releases[release].fits(change):
            return False
        self.clock += 1
        self.releases[release].take(change)
        return True

    def carry(self, name):
        """To a release from all that were current before it was last."""
        mine = self.releases[name]
        last = max(place for place, move in enumerate(self.moves) if move == name)
        for source in dict.fromkeys(self.moves[:last]):
            for change in [] if source == name else self.releases[source].series:
                if change.made > mine.read and change.release != name and change not in mine.series:
                    mine.take(change)
