"""IDs and vectors of products that come between two releases: the release's encoder and quantizer, the nearest free code.

As in an append, a newcomer gets the codes that the frozen quantizer gives it, and where its last code is taken, the nearest
that is free below the same prefix. The ID of a product that left is free only after its quarantine, and waits for that product
until then. What an append can do besides, moving to another prefix, needs the whole catalogue: a
prefix that is full is refused. Everything is read from the store at the first product that needs it.

D width of the embedding, L levels, K codes of the last level, Z width of its codebook.
"""

import functools
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts.manifest import Manifest, tree_of
from catid2_ray.artifacts.release import default_cache, fetch, tuned
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.catalog.text import join_text
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import stored_encoder
from catid2_ray.on_ray.machine.vectors import open_adapter
from catid2_ray.quantizer.adapter import LinearAdapter
from catid2_ray.quantizer.coder import encode, load_coder
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.retrieval.live_view import LiveView, codes_of
from catid2_ray.scripts import says_something

PATH = "category_path"
_SAID = ("description", PATH, "vector")
_ROWS = 16  # of one padded forward pass


class Newcomers:
    """`prepare` products that a caller describes, so that a change holds all that a replica needs."""

    def __init__(self, store: Store, parts: dict[str, Manifest]):
        self.store, self.parts = store, parts
        self.recipe = Recipe.stored(parts["ids"].recipe)

    @functools.cached_property
    def _encode(self):
        if self.parts["catalog"].metrics["width"]:
            raise InputError(
                "the catalogue's embeddings are given, so the release has no encoder for new products: send the product's vector"
            )
        encoder = {"name": self.recipe.embedding.encoder, "tokens": self.recipe.embedding.tokens}
        return stored_encoder(self.store, encoder, embeddings=self.parts["embeddings"], tuned=tuned(self.parts))

    @functools.cached_property
    def _adapter(self) -> LinearAdapter | None:
        return open_adapter(self.store, self.parts.get("adapter"))

    @functools.cached_property
    def _coder(self) -> ResidualQuantizer:
        coder = load_coder(fetch(self.store, self.parts["quantizer"], default_cache()))
        if not isinstance(coder, ResidualQuantizer) or self.parts["ids"].metrics["ids"] != "unique":
            raise InputError(
                f"IDs of kind {self.parts['ids'].metrics['ids']!r} of this quantizer cannot be made one by one: send the docid"
            )
        return coder

    @functools.cached_property
    def _tree(self) -> Taxonomy:
        return Taxonomy.from_json(self.store.read(tree_of(self.parts["embeddings"], self.parts["catalog"])).decode())

    @functools.cached_property
    def _gone(self) -> dict[int, str]:
        """Packed ID → product that left and for which this release still reserves it."""
        ids, withheld = self.parts["ids"], {}
        for entry in ids.named("ledger/"):
            table = self.store.read_table(ids.file(entry["name"]), columns=["product_id", "codes", "until"])
            table = table.filter(pc.greater(table["until"], ids.metrics["number"]))
            packed = self._space.pack(matrix(table["codes"]).astype(np.int64)).tolist()
            withheld |= dict(zip(packed, table["product_id"].to_pylist()))
        return withheld

    @functools.cached_property
    def _back(self) -> dict[str, int]:
        return {name: packed for packed, name in self._gone.items()}

    @functools.cached_property
    def _waiting_G(self) -> np.ndarray:
        return np.sort(np.array(list(self._gone), np.int64))

    @property
    def _space(self) -> DocidSpace:
        return DocidSpace(tuple(self.parts["ids"].metrics["codes_per_level"]))

    def prepare(
        self, products: Sequence[dict], view: LiveView, *, vectors: bool, keeps: Mapping[str, str] | None = None
    ) -> list[dict]:
        """The products with `docid` (text), where `vectors` are asked for `vector` (list of D floats), and, from which another
        release makes them anew, `said`: description, category_path and vector as given (`asked_again`).

        `products`: dicts with product_id, title, and optionally description, category_path, docid, vector, value, columns.
        `keeps`: product → ID that it shall keep, where no docid is given. Raises InputError where something is missing that
        cannot be made, or what the door of a job would set aside. `category_path` is the filter column of that name, too, where the
        release has it and `columns` do not say otherwise.
        """
        _refuse_silent(products)
        kept_ids = keeps or {}
        products = [{**one, "docid": one.get("docid") or kept_ids.get(one["product_id"])} for one in products]
        wanting = [one for one in products if one.get("vector") is None and (vectors or one.get("docid") is None)]
        encoded = dict(zip(map(id, wanting), self._encode(self._texts(wanting)))) if wanting else {}
        _refuse_unusable(products)
        vector_of = {id(one): self._adapted(encoded.get(id(one), one.get("vector"))) for one in products}
        docids = self._reserved(products)
        nameless = [one for one in products if one.get("docid") is None and id(one) not in docids]
        chosen = [self._space.parse(one["docid"]) for one in products if one.get("docid") is not None]
        docids |= dict(zip(map(id, nameless), self._docids(nameless, vector_of, view, chosen)))
        prepared = []
        for one in products:
            kept = {
                name: one[name] for name in ("product_id", "title", "value", "columns") if one.get(name) is not None
            }
            kept["docid"] = one.get("docid") or docids[id(one)]
            path = _names(one)[: self.recipe.catalog.max_category_depth]
            if path and view.filters is not None and PATH in view.filters.index.types:
                kept["columns"] = {PATH: path} | kept.get("columns", {})
            if vectors:
                kept["vector"] = vector_of[id(one)].tolist()
            said = {name: one[name] for name in _SAID if one.get(name)}
            if vectors and self._adapter is None and "vector" in said:
                said["vector"] = None  # it is the one beside
            prepared.append(kept | ({"said": said} if said else {}))
        return prepared

    def may_have(self, docid: str, product_id: str, view: LiveView) -> bool:
        """Whether an ID (text) is one of this release that no other product has, had or waits for."""
        try:
            codes_L = self._space.parse(docid)
            packed = int(self._space.pack(self._space.check([codes_L]))[0])
        except InputError:
            return False
        return self._gone.get(packed, product_id) == product_id and codes_L[-1] not in _taken(view, codes_L[:-1])

    def _adapted(self, vector) -> np.ndarray:
        """V d of a vector as the encoder makes them, so that it lies among the release's; one of another width as it is."""
        vector_D = np.asarray(vector, np.float32)
        if self._adapter is None or vector_D.shape != (self._adapter.width,):
            return vector_D
        return self._adapter.products(vector_D[None])[0]

    def _texts(self, products: Sequence[dict]) -> list[str]:
        table = pa.table(
            {
                "title": pa.array([one["title"] for one in products], pa.string()),
                "description": pa.array([one.get("description") for one in products], pa.string()),
                "category_path": pa.array([one.get("category_path") or [] for one in products], pa.list_(pa.string())),
            }
        )
        return join_text(table, self.recipe.embedding.text)

    def _reserved(self, products: Sequence[dict]) -> dict[int, str]:
        """id() of a product that left and returns → the ID it had. Raises InputError for a docid that waits for another."""
        for one in products:
            packed = int(self._space.pack(np.array([self._space.parse(one["docid"])]))[0]) if one.get("docid") else None
            if self._gone.get(packed, one["product_id"]) != one["product_id"]:
                raise InputError(
                    f"{one['docid']} waits for product {self._gone[packed]!r}, which left and may return (ids.id_quarantine); send "
                    f"another docid for product {one['product_id']!r}, or none"
                )
        return {
            id(one): self._space.text(self._space.unpack([self._back[one["product_id"]]])[0].tolist())
            for one in products
            if one.get("docid") is None and one["product_id"] in self._back
        }

    def _docids(
        self, products: Sequence[dict], vector_of: dict, view: LiveView, chosen: Sequence[tuple[int, ...]]
    ) -> list[str]:
        """`chosen`: codes that other products of the same change bring, which are taken too."""
        if not products:
            return []
        coder, docids = self._coder, []
        width = self.parts["embeddings"].metrics["width"]
        for one in products:
            if vector_of[id(one)].shape != (width,):
                raise InputError(
                    f"the vector of product {one['product_id']!r} has {vector_of[id(one)].size} numbers, the release's {width}"
                )
        vector_MD = torch.from_numpy(np.stack([vector_of[id(one)] for one in products]))
        paths = pa.array([one.get("category_path") or [] for one in products], pa.list_(pa.string()))
        category_MH = torch.from_numpy(self._tree.category_ids(paths, grown=True).astype(np.int64))
        encoded = encode(coder, vector_MD, category_MH, rows=_ROWS)
        book_KZ = coder.codebooks[-1].detach()
        distance_MK = torch.cdist(encoded.residual_BZ, book_KZ).numpy()
        mine: dict[tuple, set[int]] = {}
        for *prefix, code in chosen:
            mine.setdefault(tuple(prefix), set()).add(code)
        space = DocidSpace(tuple(view.codes_per_level))
        for one, codes_L, distance_K in zip(products, encoded.codes_BL.tolist(), distance_MK):
            prefix = tuple(codes_L[:-1])
            home = space.pack(np.array([[*prefix, 0]]))[0]
            first, last = np.searchsorted(self._waiting_G, [home, home + space.codes_per_level[-1]])
            waiting = (self._waiting_G[first:last] - home).tolist()
            taken = mine.setdefault(prefix, set())
            taken |= {*_taken(view, prefix), *waiting}
            free = [code for code in np.argsort(distance_K, kind="stable").tolist() if code not in taken]
            if not free:
                raise InputError(
                    f"all {len(distance_K)} IDs below {space.text(prefix)} are taken, so product {one['product_id']!r} has no "
                    "place near its like: send a docid of your choice, or leave it to the next append"
                )
            taken.add(free[0])
            docids.append(space.text([*prefix, free[0]]))
        return docids


def asked_again(product: dict) -> dict:
    """What the caller asked for, of a product as `prepare` gave it, without its docid."""
    said = dict(product.get("said", {}))
    if "vector" in said and said["vector"] is None:
        said["vector"] = product["vector"]
    asked = {name: product[name] for name in ("product_id", "title", "value", "columns") if name in product}
    path = asked.get("columns", {}).get(PATH)
    if path and path == _names(said)[: len(path)]:  # made of it; another release may have no such column
        left = {name: value for name, value in asked.pop("columns").items() if name != PATH}
        asked |= {"columns": left} if left else {}
    return asked | said


def _names(product: Mapping) -> list[str]:
    """Those of its category path, as the door reads them: stripped, and an empty one ends the path."""
    return list(takewhile(bool, map(str.strip, product.get(PATH) or [])))


def _refuse_silent(products: Sequence[dict]) -> None:
    """Raise InputError for an id or a title for which the door of a job would set the product aside."""
    for one in products:
        if not one["product_id"].strip():
            raise InputError(f"a product id is more than blanks, found {one['product_id']!r}")
        if one["title"] is not None and not says_something(one["title"]):  # a release without titles has none to keep
            raise InputError(
                f"the title of product {one['product_id']!r} needs at least one letter or digit, found {one['title'][:50]!r}"
            )


def _refuse_unusable(products: Sequence[dict]) -> None:
    """Raise InputError for a vector that the door of a job would set aside: beyond float32, or all zeros."""
    for one in products:
        if one.get("vector") is None:
            continue
        with np.errstate(over="ignore", under="ignore"):
            largest = np.abs(np.asarray(one["vector"], np.float32)).max(initial=0)
        if not 0 < largest < np.inf:
            raise InputError(
                f"the vector of product {one['product_id']!r} must be finite as float32 and not all zeros; send it as the encoder "
                "of the products makes it"
            )


def _taken(view: LiveView, prefix: tuple[int, ...]) -> list[int]:
    """Last codes below a prefix that a product has or had, in the release or since."""
    start, end = view.base.item_range(prefix)
    rows = np.arange(start, end)
    if view.inserted is not None:
        rows = np.append(rows, view.base.rows + np.arange(len(view.live_inserted)))
    codes_ML = codes_of(view, rows)
    return codes_ML[(codes_ML[:, :-1] == np.array(prefix, np.int64)).all(1), -1].tolist()
