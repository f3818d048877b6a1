"""PUT of products: insert those that are new, replace those whose text changed, change columns and values of others in place.

The same content again writes nothing, and a repeated idempotency key is answered with its first change, whoever asks which
replica: what was put lies in the series that all of them follow. What was put last is known by two digests of a product, of its
text and of all of it, so that a price that changes in a whole product needs no new row.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.artifacts.manifest import digest_of
from catid2_ray.errors import InputError
from catid2_ray.on_ray.machine.live_log import LiveUpdates, changes_of
from catid2_ray.on_ray.serve.newcomers import Newcomers
from catid2_ray.retrieval.below import below
from catid2_ray.retrieval.live_view import codes_of
from catid2_ray.retrieval.retriever import Retriever

_TEXT = ("title", "description", "category_path", "vector", "docid")


class Done(NamedTuple):
    """`number`: of the change that holds what was asked for; `products`: dicts with product_id, docid and did: "inserted",
    "replaced", "changed" (in place) or "unchanged"."""

    number: int
    products: list[dict]


class Standing(NamedTuple):
    """The row that a product's name means, None where the release never had it, and whether it is live."""

    row: int | None
    live: bool


def standing(retriever: Retriever, name: str) -> Standing:
    try:
        row = retriever.live.row(name)
    except InputError:
        return Standing(None, False)
    return Standing(row, bool(retriever.live.view.is_live([row])[0]))


class Puts:
    """Puts products into the release that `updates` keeps."""

    def __init__(self, updates: LiveUpdates, newcomers: Newcomers):
        self.updates, self.newcomers = updates, newcomers

    def put(self, asked: Sequence[dict], *, key: str | None = None) -> Done:
        """All of it or nothing. `asked`: dicts with product_id, and optionally title, description, category_path, vector, docid,
        value and columns; what is None or empty is not given.

        A product that is not live needs a title. A live one changes in place where its text is not given or is what it was; else
        it gets a new row, which has of columns and value only those given, under the same ID unless a docid is given. Raises
        InputError where something does not fit or `key` was used for something else, CommitConflict, StorageError.
        """
        asked = [{name: value for name, value in one.items() if value not in (None, [], {})} for one in asked]
        request, answer = digest_of(asked), Done(0, [])

        def build() -> dict | None:
            nonlocal answer
            if key in self.updates.keys:
                answer = self._repeated(key, request)
                return None
            record = self.record(asked)
            answer = Done(self.updates.applied, record["answer"])
            if not record["content"]:
                numbers = [self.updates.contents[one["product_id"]].number for one in asked if self._known(one)]
                answer = Done(max(numbers, default=self.updates.applied), record["answer"])
                return None
            return record | ({} if key is None else {"key": key, "request": request})

        written = self.updates.change(build)
        return answer if written is None else Done(written["number"], written["answer"])

    def _repeated(self, key: str, request: str) -> Done:
        number, first = self.updates.keys[key]
        if first != request:
            raise InputError(
                f"the idempotency key {key!r} was used for other products; take a new key for each request"
            )
        changes = changes_of(self.updates.log.find(number))
        return Done(number, next(one["answer"] for one in changes if one.get("key") == key))

    def _known(self, one: dict) -> bool:
        return one["product_id"] in self.updates.contents

    def record(self, asked: Sequence[dict], *, keeps: Mapping[str, str] | None = None) -> dict:
        """The change that puts these products now, without those that are as asked; `content` is empty where all are.

        `keeps`: product → ID that it gets where it is not known and no docid is given.
        """
        retriever, whole, changed, content, did = self.updates.retriever, [], [], {}, {}
        names = [one["product_id"] for one in asked]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise InputError(f"product {twice[0]!r} is put twice in one request; put it once")
        rows, keeps = {name: standing(retriever, name) for name in names}, dict(keeps or {})
        for one in asked:
            name, (row, live) = one["product_id"], rows[one["product_id"]]
            text, whole_digest = digest_of({key: one.get(key) for key in _TEXT}), digest_of(one)
            before = self.updates.contents.get(name) if live else None
            if before and before.whole == whole_digest:
                did[name] = "unchanged"
                continue
            in_place = live and (before and before.text == text or self._same_text(one, row))
            if not in_place:
                content[name], did[name] = [text, whole_digest], "replaced" if live else "inserted"
                if "title" not in one and not live:
                    raise InputError(f"product {name!r} is not live, so it needs a title; send one, or restore it")
                whole.append({"title": retriever.products.title(row) if live else None, **one})
                if row is not None:
                    keeps[name] = self._docid(row)
                continue
            change = self._change(one)
            if len(change) == 1:
                did[name] = "unchanged"
                continue
            changed.append(change)
            # Where no text was given, what was given before is still the product's.
            same = before.text if before and not any(key in one for key in _TEXT) else text
            content[name], did[name] = [same, whole_digest], "changed"
        made = self._made(whole, keeps)
        docid_of = {one["product_id"]: one["docid"] for one in made}
        answer = [
            {"product_id": name, "docid": docid_of.get(name) or self._docid(rows[name][0]), "did": did[name]}
            for name in names
        ]
        return {"kind": "put", "products": made, "changed": changed, "content": content, "answer": answer}

    def _docid(self, row: int) -> str:
        retriever = self.updates.retriever
        return retriever.space.text(codes_of(retriever.live.view, np.array([row]))[0].tolist())

    def _same_text(self, one: dict, row: int) -> bool:
        same_title = "title" not in one or one["title"] == self.updates.retriever.products.title(row)
        same_docid = "docid" not in one or one["docid"] == self._docid(row)
        return same_title and same_docid and not any(key in one for key in ("description", "category_path", "vector"))

    def _change(self, one: dict) -> dict:
        """Columns and value that a product gets in place. A value is left out where the release has none, as of new products."""
        has_values = self.updates.retriever.products.values is not None
        wanted = ("product_id", "columns", "value") if has_values else ("product_id", "columns")
        return {key: one[key] for key in wanted if key in one}

    def _made(self, whole: list[dict], keeps: Mapping[str, str]) -> list[dict]:
        """The rows of products that are new or replaced. One that was withdrawn keeps its ID unless that is another's now."""
        if not whole:
            return []
        retriever = self.updates.retriever
        view, names = retriever.live.view, {one["product_id"] for one in whole}
        free = {name: docid for name, docid in keeps.items() if self._is_free(docid, names)}
        vectors = retriever.products.base_vectors is not None
        return self.newcomers.prepare(whole, view, vectors=vectors, keeps=free)

    def _is_free(self, docid: str, names: set[str]) -> bool:
        """Whether no live product but these has the ID."""
        retriever = self.updates.retriever
        holders = below(retriever.live, retriever.live.view, retriever.space.parse(docid)).rows
        return all(retriever.products.name(row) in names for row in holders)
