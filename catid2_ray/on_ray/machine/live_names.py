"""What a series of live changes does to names and IDs alone: enough to say who has which ID at its end, without a replica.

A change that replicas refuse does nothing here either. Series that older versions wrote may hold such changes; what is written
now is validated first.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Step(NamedTuple):
    """One change. `docids`: of an insert or put, one a name, as text; `changed`: products that keep row and ID."""

    kind: str
    names: tuple[str, ...]
    docids: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: dict) -> "Step":
        products = record["products"]
        if record["kind"] in ("insert", "put"):
            names, docids = (tuple(one[key] for one in products) for key in ("product_id", "docid"))
            return cls(record["kind"], names, docids, tuple(one["product_id"] for one in record.get("changed", ())))
        return cls(record["kind"], tuple(products))


class Names:
    """`base`: product → ID of the release's products, at least of those whose name or ID a step mentions."""

    def __init__(self, base: Mapping[str, str]):
        self.docid_of = dict(base)
        self.live = {docid: name for name, docid in base.items()}
        self.inserted: set[str] = set()

    def take(self, step: Step) -> bool:
        """Whether the step was taken: one that does not fit leaves all as it was."""
        fits = {"insert": self._insert, "put": self._put, "withdraw": self._withdraw, "restore": self._restore}
        return step.kind in fits and fits[step.kind](step)

    def is_live(self, name: str) -> bool:
        return name in self.docid_of and self.live.get(self.docid_of[name]) == name

    def _insert(self, step: Step) -> bool:
        return not any(map(self.is_live, step.names)) and self._put(step)

    def _put(self, step: Step) -> bool:
        """New products, and live ones in another form."""
        if any(len(set(values)) < len(values) for values in (step.names, step.docids)):
            return False
        if any(self.live.get(docid) not in (None, *step.names) for docid in step.docids):
            return False
        self._hide(step.names)
        self.docid_of |= zip(step.names, step.docids)
        self.live |= zip(step.docids, step.names)
        self.inserted |= set(step.names)
        return True

    def _withdraw(self, step: Step) -> bool:
        if not all(name in self.docid_of for name in step.names):
            return False
        self._hide(step.names)
        return True

    def _hide(self, names: Iterable[str]) -> None:
        for name in names:
            if self.is_live(name):
                del self.live[self.docid_of[name]]

    def _restore(self, step: Step) -> bool:
        names = set(step.names)
        if not all(name in self.docid_of for name in names):
            return False
        back = {self.docid_of[name]: name for name in names if not self.is_live(name)}
        if len(back) < sum(not self.is_live(name) for name in names) or back.keys() & self.live.keys():
            return False
        self.live |= back
        return True


def given(steps: Iterable[Step], base: Mapping[str, str]) -> dict[str, str]:
    """Product → ID of those that were inserted and are live after the steps; `base` as `Names` takes it."""
    names = Names(base)
    for step in steps:
        names.take(step)
    return {name: names.docid_of[name] for name in sorted(names.inserted) if names.is_live(name)}
