"""Live changes across releases, by a clock: a release holds every change that is younger than its catalogue.

A slow model: sets of products, and every change with the time at which it was made. From one release to the next goes what took
effect; what a release left out goes on from where it was made.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    made: int
    release: str
    number: int
    kind: str


@dataclass
class Release:
    """`read`: when its catalogue was read; `series`: what each change did here."""

    catalogue: set[str]
    read: int
    live: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    series: dict[Change, set[str]] = field(default_factory=dict)

    def __post_init__(self):
        self.live, self.known = set(self.catalogue), set(self.catalogue)


class World:
    def __init__(self):
        self.clock, self.releases, self.moves = 0, {}, []

    def publish(self, name, catalogue, read):
        self.releases[name] = Release(set(catalogue), read)
        self.moves.append(name)

    def roll_back(self, name):
        self.moves.append(name)

    def change(self, release, kind, names):
        """Made on a release itself. False where it does not fit, which changes nothing."""
        mine, names = self.releases[release], set(names)
        if kind == "insert" and names & mine.live or kind != "insert" and names - mine.known:
            return False
        self.clock += 1
        number = sum(change.release == release for change in mine.series)
        change = Change(self.clock, release, number, kind)
        self._take(mine, change, names)
        mine.series[change] = names  # as it was asked for, whether or not it changed anything here
        return True

    def _take(self, release, change, names):
        suited = {"insert": names - release.live, "withdraw": names & release.known}
        names = suited.get(change.kind, (names & release.known) - release.live)
        if change.kind == "withdraw":
            release.live -= names
        else:
            release.live |= names
            release.known |= names
        release.series[change] = names

    def carry(self, name):
        """To a release from all that were current before it was last."""
        mine = self.releases[name]
        last = max(place for place, move in enumerate(self.moves) if move == name)
        for source in dict.fromkeys(self.moves[:last]):
            if source == name:
                continue
            for change, names in self.releases[source].series.items():
                younger = change.made > mine.read and change.release != name
                if names and younger and change not in mine.series:
                    self._take(mine, change, names)
