"""From query text to products: tokenizer, constrained beam search over a live trie, and the products of what it found.

Reads a plain folder (no store), see `folder.py`. What a release says of beams, precision, early stop and re-scoring is
done here, so what is evaluated is what is served. Where it looks ahead, a product that no query ever named is found because
its node is near. Products may be inserted, withdrawn and restored while queries run.
A k wider than the beam widens the beam, but where products are re-scored: there k is a cut of the candidates.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, QueryError
from catid2_ray.generator.users import Reading, User, with_users
from catid2_ray.generator.vocabulary import tokenize
from catid2_ray.retrieval import folder as folders
from catid2_ray.retrieval.beam import BeamResult, constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.exact import Exact, exact_scores
from catid2_ray.retrieval.filters import Filter, FilterIndex, LiveFilter
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import LiveView, codes_of, filters_for
from catid2_ray.retrieval.lookahead import Ahead, Lookahead, best_words
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer, ProductNames, Products, arrow_strings
from catid2_ray.retrieval.rescoring import Expansion, Hit, beam_hits, expanded_hits, first_beams
from catid2_ray.retrieval.trie import Trie
from catid2_ray.scripts import says_something

MAX_K = 1000
_SCORES = 2**26  # BM25 of every product for every query of a batch: 256 MiB at most, and as much for the nodes


class Adapter(Protocol):
    """What the encoder's vectors (floats N×D) become before they are compared: float32 N×D, rows of length 1."""

    def queries(self, vector_ND) -> np.ndarray: ...

    def products(self, vector_ND) -> np.ndarray: ...


class Soft(NamedTuple):
    """Queries that need not wait for the end of the search: each is answered from the level that is reached when its time is over.

    `deadlines`: times of `clock`, None for a query that waits. `answered` gets the number of such a query, its products and the
    levels searched, as soon as they are known."""

    deadlines: Sequence[float | None]
    answered: Callable[[int, list[Hit], int], None]
    clock: Callable[[], float] = time.monotonic


class Retriever:
    """Answers queries with products.

    `product_ids` and `titles`: one per trie row, in trie order (sequence or Arrow array); or `products`, all that is known
    of the rows, and `names`, their ids sorted (made here where left out). `beam_width`: a number, or one per level.
    `stop_level`: levels to search (None: whole IDs), which needs `expansion`. `lookahead`: the search looks ahead by these
    weights and the vectors of `nodes`. `encode_query`: texts → floats B×D, for re-scoring by vectors and for looking ahead;
    left out, the decoder's encoder gives them; either way they go through `adapter`, as the products' vectors did. `index`:
    columns for filters; without it requests filter by product id alone. `query_tokens`: longer queries are cut. `reading`: what
    the generator was taught to read of a user, if anything. `batch`: queries per search at a beam of 100; wider beams take fewer,
    as memory grows with both.

    Raises ReleaseError when products and trie differ in length, InputError when the model does not fit the trie or
    re-scoring lacks what it needs.

    `tell` gets, of each query of a search, the share of the last level's beams that hold an ID (floats B); replace it.
    """

    tell: Callable[[np.ndarray], object] = staticmethod(lambda alive_B: None)

    def __init__(
        self,
        model,
        tokenizer,
        trie: Trie,
        product_ids=None,
        *,
        titles=None,
        products: Products | None = None,
        names: ProductNames | None = None,
        index: FilterIndex | None = None,
        beam_width: int | Sequence[int] = 100,
        stop_level: int | None = None,
        expansion: Expansion | None = None,
        lookahead: Lookahead | None = None,
        nodes: NodeVectors | None = None,
        encode_query: Callable[[list[str]], np.ndarray] | None = None,
        adapter: Adapter | None = None,
        max_query_chars: int = 2000,
        query_tokens: int = 32,
        reading: Reading | None = None,
        normalize: str = "level",
        weights: str = "float32",
        release: str = "",
        batch: int = 32,
    ):
        codes = trie.codes_per_level
        self.decoder = decoder_for(model, codes_per_level=codes, weights=weights)
        self.tokenizer, self.space = tokenizer, DocidSpace(tuple(codes))
        products = products or Products(arrow_strings(product_ids), arrow_strings(titles))
        products.check(trie.rows)
        if lookahead is not None and (nodes is None or (lookahead.lexical_weight and products.base_lexical is None)):
            lacks = "node vectors" if nodes is None else "a lexical index"
            raise InputError(f"looking ahead needs {lacks}, which the release lacks; make its serving part again")
        self.live = LiveTrie(
            trie,
            product_ids=names or products.product_ids,
            index=index or FilterIndex({"product_id": products.product_ids}),
            products=products,
            nodes=None if lookahead is None else nodes,
        )
        self.widths = (
            [beam_width] * trie.levels if isinstance(beam_width, int) else [int(width) for width in beam_width]
        )
        self.levels = trie.levels if stop_level is None else stop_level
        if len(self.widths) < self.levels or not 1 <= self.levels <= trie.levels:
            raise InputError(
                f"{len(self.widths)} beam widths and {self.levels} levels to search do not fit IDs of {trie.levels} levels"
            )
        if expansion is None and self.levels < trie.levels:
            raise InputError(
                f"stopping at level {self.levels} of {trie.levels} finds prefixes; give expansion settings"
            )
        if expansion is not None:
            expansion.check(self.products)
        self.expansion, self.encode_query, self.adapter = expansion, encode_query, adapter
        self.lookahead = lookahead
        self.max_query_chars, self.query_tokens, self.reading = max_query_chars, query_tokens, reading
        self.normalize, self.release, self.batch = normalize, release, batch

    @classmethod
    def open(cls, folder, **options) -> "Retriever":
        """Load a release's folder. `options`: as `folder.opened` takes them. Raises ArtifactError or ReleaseError."""
        return cls(**folders.opened(folder, **options))

    @property
    def trie(self) -> Trie:
        return self.live.base

    @property
    def products(self) -> Products:
        """What is known of each row now; a search reads those of its view."""
        return self.live.view.products

    @property
    def beam_width(self) -> int:
        """The most products that a query finds without a wider search."""
        return self.widths[self.levels - 1] if self.expansion is None else MAX_K

    def check(self, query: str, *, k: int) -> None:
        """Raise QueryError for a query or a k that cannot be answered."""
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_K:
            raise QueryError(f"k must be a whole number from 1 to {MAX_K}, found {k!r}")
        if not isinstance(query, str) or not says_something(query):
            raise QueryError(f"a query needs at least one letter or digit, found {query!r}")
        if len(query) > self.max_query_chars:
            raise QueryError(f"a query may have {self.max_query_chars} characters, found {len(query)}; shorten it")

    def compile(self, expression) -> LiveFilter | None:
        """The filter of a JSON expression (see `filters.py`); None for None. Raises QueryError saying what is wrong."""
        return None if expression is None else self.live.compile(expression)

    @property
    def reads_users(self) -> bool:
        """Whether who asks may change what is found."""
        return self.reading is not None and self._asks

    def reads(self, user: User) -> bool:
        """Whether anything that is known of this user is read."""
        return self.reads_users and bool(user.attributes or (user.recent and self.reading.recent))

    def retrieve(
        self, queries: Sequence[str], *, k: int, filters: Sequence | None = None, allowed=None,
        beam_width: int | None = None, soft: Soft | None = None, users: Sequence[User | None] | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        """At most `k` products per query, best first.

        `filters`: a JSON expression, or None, for each query. `allowed`, instead: a `Filter` or bool per trie row for all of
        them. `beam_width`: at every level, in place of the release's. `soft`: answer some queries early, by `hurried`; it has no
        effect where that is None. `users`: who asks each query, None where that is not known; only the generator reads them.
        Raises QueryError when any query, filter, user or k cannot be answered.
        """
        for query in queries:
            self.check(query, k=k)
        self._check_users(users, len(queries))
        if filters is not None and len(filters) != len(queries):
            raise QueryError(f"{len(filters)} filters for {len(queries)} queries; give one, or None, for each")
        view = self.live.view
        products = view.products
        if filters is not None and allowed is None:
            chosen = [None if one is None else view.compile(one) for one in filters]
        else:
            if isinstance(allowed, Filter):
                # A filter of the release allows no product that was inserted since.
                allowed = LiveFilter(allowed, Filter.of(np.zeros(len(view.live_inserted), bool)))
            chosen = filters_for(allowed, view, len(queries))
        widths = self.widths_for(k, beam_width)
        widest = max(widths)
        size, answers = max(1, min(self.batch, self.batch * 100 // widest)), []
        if self.lookahead and self.lookahead.lexical_weight:
            size = max(1, min(size, _SCORES // view.rows))
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            early = None if soft is None or self.hurried is None else _of_part(soft, part)
            mine = None if users is None else users[part]
            answers += self._answers(list(queries[part]), view, products, k, chosen[part], widths, early, mine)
        return answers

    def why_fewer(self, found: int, *, k: int, expression=None) -> Literal["search", "catalogue"] | None:
        """Why a query found fewer than `k` products; None where it found `k`. "catalogue": no more products are there, or pass the
        filter `expression`; "search": there are more, but the beams of the release hold no more to rank."""
        if found >= k:
            return None
        view = self.live.view
        base, inserted = view.restricted(None if expression is None else view.compile(expression))
        return "search" if base.total + inserted.total > found else "catalogue"

    def _needed(self, k: int) -> int:
        return k if self.expansion is None else 1

    def widths_for(self, k: int, beam_width: int | None = None) -> list[int]:
        """Beams at each level that is searched, for `k` products; `beam_width`: in place of the release's."""
        return [max(beam_width or width, self._needed(k)) for width in self.widths[: self.levels]]

    @property
    def hurried(self) -> Expansion | None:
        """How products below the beams of a level are ranked when the search ends there: as the release re-scores, else by their
        vectors alone; None where it has no vectors."""
        vectors = self.products.base_vectors
        if vectors is None or (self.expansion and self.expansion.dense != "none"):
            return self.expansion if vectors is not None else None
        return Expansion(a=0.0, dense="dot", unit_vectors=vectors.normalized) if self.lookahead else None

    def _answers(
        self, queries: list[str], view: LiveView, products: Products, k: int, allowed, widths, soft: Soft | None = None,
        users: Sequence[User | None] | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        ids_BT, mask_BT, memory, query_BD = self._asked(queries, users, view)
        early: dict[int, list[Hit]] = {}

        def ranked(result: BeamResult, rows: list[int], settings: Expansion) -> list[list[Hit]]:
            vector_BD = query_BD if query_BD is None else query_BD[rows]
            if vector_BD is not None and settings.unit_vectors:
                vector_BD = torch.nn.functional.normalize(vector_BD, dim=-1)
            return expanded_hits(
                BeamResult(*(None if one is None else one[rows] for one in result)), view, products, settings,
                queries=[queries[row] for row in rows], query_BD=vector_BD, k=k, allowed=[allowed[row] for row in rows],
                asked=self._asks,
            )  # fmt: skip

        def at_level(level: int, found: Callable[[int], BeamResult]) -> bool:
            now = soft.clock()
            late = [row for row, until in enumerate(soft.deadlines) if until is not None and until <= now]
            if late := [row for row in late if row not in early]:
                early.update(zip(late, ranked(first_beams(found(widths[level - 1])), late, self.hurried)))
                for row in late:
                    soft.answered(row, early[row], level)
            return len(early) == len(queries)

        result = constrained_beam_search(
            self.decoder, view, ids_BT, mask_BT, beam_width=widths, top_k=widths[-1] if self.expansion else k,
            allowed=allowed, normalize=self.normalize, levels=self.levels, memory=memory,
            ahead=self._ahead(queries, query_BD, view, products, allowed), at_level=None if soft is None else at_level,
        )  # fmt: skip
        self.tell(result.count_B.numpy() / min(result.logp_BK.shape[1], widths[result.docid_BKL.shape[-1] - 1]))
        if len(early) == len(queries):
            return [early[row] for row in range(len(queries))]
        if self.expansion is None:
            hits = beam_hits(result, view, products, k=k, allowed=allowed, asked=self._asks)
        else:
            hits = ranked(result, list(range(len(queries))), self.expansion)
        return [early.get(row, mine) for row, mine in enumerate(hits)]

    @property
    def _asks(self) -> bool:
        """Whether the search asks the generator."""
        return self.lookahead is None or self.lookahead.logp_weight != 0

    def _asked(
        self, queries: list[str], users: Sequence[User | None] | None = None, view: LiveView | None = None
    ) -> tuple:
        """(token ids, mask, what the decoder's encoder makes of them, the queries' vectors), each None where nothing needs it.
        `view`: where the IDs of what users looked at stand."""
        ids_BT = mask_BT = memory = query_BD = None
        known = users is not None and any(users)
        if self._asks or self.encode_query is None:
            ids_BT, mask_BT, memory = self._encoded(queries, users if known else None, view)
        if self.lookahead or (self.expansion and self.expansion.dense != "none"):
            dense_BE = getattr(memory, "dense_BE", None)
            if known and self.encode_query is None:  # a query's vector knows of no user
                dense_BE = getattr(self._encoded(queries)[2], "dense_BE", None)
            query_BD = self._vectors(queries, dense_BE)
        return ids_BT, mask_BT, memory, query_BD

    def _ahead(self, queries: list[str], query_BD, view: LiveView, products: Products, allowed) -> Ahead | None:
        if self.lookahead is None:
            return None
        words = None
        if self.lookahead.lexical_weight:
            words = best_words(products.all_lexical_scores(queries), view, allowed)
        return Ahead(self.lookahead, view.nodes, query_BD, device=self.decoder.device, words=words)

    def exact(self, queries: Sequence[str]) -> Exact:
        """Of each node of the release, per depth searched, the score by which the search would choose it, had it pruned none: log P
        (`exact.exact_scores`), or S where it looks ahead; and log P. Products inserted since are left out."""
        queries, view, logp_L = list(queries), self.live.view, None
        ids_BT, mask_BT, memory, query_BD = self._asked(queries)
        if self._asks:
            logp_L = exact_scores(
                self.decoder, self.trie, ids_BT, mask_BT, levels=self.levels, normalize=self.normalize, memory=memory
            )
        ahead = self._ahead(queries, query_BD, view, view.products, [None] * len(queries))
        if ahead is None:
            return Exact(logp_L, logp_L)
        score_L = ahead.every_node(self.trie, self.levels, logp_L)
        return Exact(score_L, [np.zeros_like(score_Bn) for score_Bn in score_L] if logp_L is None else logp_L)

    def searched(
        self, queries: Sequence[str], *, widths: Sequence[int], levels: int | None = None, top_k: int, allowed=None,
        scored_as: Sequence | None = None, view: LiveView | None = None, at_level: Callable | None = None,
        users: Sequence[User | None] | None = None,
    ) -> BeamResult:  # fmt: skip
        """What the release's search finds with other widths, one per level, before products are taken of it: IDs, or where
        `levels` (None: as released) ends it earlier, prefixes. `allowed`: as `retrieve` takes it. `scored_as`: other
        filters, one per query or None, whose products' best words count below a node; `allowed` then only leaves prefixes out.
        `view`: a state of the products that the filters are of, in place of that of now. `at_level`: as
        `constrained_beam_search` takes it. `users`: as `retrieve` takes them."""
        queries, view = list(queries), view or self.live.view
        self._check_users(users, len(queries))
        ids_BT, mask_BT, memory, query_BD = self._asked(queries, users, view)
        chosen = filters_for(allowed, view, len(queries))
        return constrained_beam_search(
            self.decoder, view, ids_BT, mask_BT, beam_width=list(widths), top_k=top_k, allowed=chosen,
            normalize=self.normalize, levels=levels or self.levels, memory=memory,
            ahead=self._ahead(
                queries, query_BD, view, view.products,
                chosen if scored_as is None else filters_for(scored_as, view, len(queries)),
            ),
            at_level=at_level,
        )  # fmt: skip

    def rescored(
        self, result: BeamResult, queries: Sequence[str], *, k: int, expansion: Expansion, trie=None
    ) -> list[list[Hit]]:
        """The products of any search's result, re-scored with these settings, at most `k` per query. `trie`: what was searched,
        such as `live.view`; None for the release as it was published."""
        query_BD = None
        if expansion.dense != "none":
            dense_BE = None if self.encode_query else getattr(self._encoded(list(queries))[2], "dense_BE", None)
            query_BD = self._vectors(list(queries), dense_BE)
            query_BD = torch.nn.functional.normalize(query_BD, dim=-1) if expansion.unit_vectors else query_BD
        products = self.products.of_release if trie is None else getattr(trie, "products", self.products)
        return expanded_hits(
            result, trie or self.trie, products, expansion, queries=queries, query_BD=query_BD, k=k, allowed=None,
            asked=self._asks,
        )  # fmt: skip

    def _encoded(
        self, texts: list[str], users: Sequence[User | None] | None = None, view: LiveView | None = None
    ) -> tuple[Tensor, Tensor, object]:
        """(token ids B×T, mask B×T, what the decoder's encoder makes of them)."""
        input_BT = tokenize(self.tokenizer, texts, length=self.query_tokens)
        if users is not None:
            input_BT = self._with_users(input_BT, [user or User() for user in users], view)
        ids_BT = torch.as_tensor(input_BT).long()
        mask_BT = ids_BT != self.tokenizer.pad_token_id
        used, device = max(1, int(mask_BT.any(0).sum())), self.decoder.device
        ids_BT, mask_BT = ids_BT[:, :used].to(device), mask_BT[:, :used].to(device)
        with torch.inference_mode():
            return ids_BT, mask_BT, self.decoder.encode(ids_BT, mask_BT)

    def _with_users(self, query_BT: np.ndarray, users: Sequence[User], view: LiveView) -> np.ndarray:
        """Inputs as the generator's examples have them: of the latest products those that are not known count as absent."""
        recent = [user.recent[-self.reading.recent :] if self.reading.recent else () for user in users]
        row_of = {name: self.row_of(name, view) for name in {name for names in recent for name in names}}
        rows = [[row_of[name] for name in names if row_of[name] is not None] for names in recent]
        codes_RL = codes_of(view, [row for mine in rows for row in mine])
        return with_users(
            self.tokenizer, query_BT, [" ".join(user.attributes) for user in users],
            np.repeat(np.arange(len(users)), [len(mine) for mine in rows]), codes_RL, space=self.space,
            attribute_tokens=self.reading.tokens, recent=self.reading.recent,
        ).input_ids_NT  # fmt: skip

    def row_of(self, product_id: str, view: LiveView) -> int | None:
        """Its row in a state of the products, live or not; None where it has none there: rows may be numbered anew meanwhile."""
        try:
            row = self.live.row(product_id)
        except InputError:
            return None
        return row if row < view.rows and view.products.name(row) == product_id else None

    def _check_users(self, users: Sequence[User | None] | None, queries: int) -> None:
        if users is None:
            return
        if len(users) != queries:
            raise QueryError(f"{len(users)} users for {queries} queries; give one, or None, for each")
        for user in users:
            for field, said in {} if user is None else user._asdict().items():
                if isinstance(said, str) or not all(isinstance(one, str) for one in said):
                    raise QueryError(f"a user's {field} must be several texts, such as ({said!r},), found {said!r}")
        if any(users) and self.reading is None:
            raise QueryError(
                f"release {self.release!r} has a generator that reads no users: train it with generator.mix.user, or name none"
            )

    def _vectors(self, texts: list[str], dense_BE: Tensor | None, *, of: str = "queries") -> Tensor:
        """The vectors of queries, or `of` "products" by their titles, as encoder and adapter give them."""
        if self.encode_query is not None:
            vector_BD = torch.as_tensor(np.asarray(self.encode_query(texts), np.float32))
        elif dense_BE is not None:
            vector_BD = dense_BE.float().cpu()
        else:
            raise InputError("there is no encoder for vectors of queries and new products; give encode_query")
        return vector_BD if self.adapter is None else torch.from_numpy(getattr(self.adapter, of)(vector_BD.numpy()))

    def insert(
        self, newcomers: Sequence[Newcomer], codes_ML, columns=None, *, check_only: bool = False
    ) -> None:  # fmt: skip
        """As `put`, for products that are new: one that is live is refused."""
        self._put(newcomers, codes_ML, columns, only_new=True, check_only=check_only)

    def put(
        self, newcomers: Sequence[Newcomer] = (), codes_ML=(), columns=None, *,
        changed: Mapping[str, Mapping] | None = None, values: Mapping[str, float | None] | None = None,
        check_only: bool = False,
    ) -> None:  # fmt: skip
        """Insert or replace products with their IDs (integers M×L), and change others in place: from the next search on, all
        of it or nothing. A search that runs sees the state before.

        `newcomers`, `columns` (name → a value, or None, for each newcomer), `changed` (product id → {column: value}) and
        `values` (product id → business value): as `LiveTrie.put` takes them. A newcomer without a vector gets that of its
        title where the release has vectors; one that it brings lies among the release's (V d, where there is an adapter).
        `check_only`: raise what the change would raise, and change nothing.
        Raises InputError and CapacityError as `LiveTrie.put`; what is refused leaves no trace.
        """
        self._put(newcomers, codes_ML, columns, changed=changed, values=values, check_only=check_only)

    def withdraw(self, products: Sequence[str], *, check_only: bool = False) -> None:
        """As `LiveTrie.withdraw`."""
        self.live.withdraw(products, check_only=check_only)

    def restore(self, products: Sequence[str], *, check_only: bool = False) -> None:
        """As `LiveTrie.restore`."""
        self.live.restore(products, check_only=check_only)

    def live_state(self) -> dict[str, pa.Table]:
        """As `LiveTrie.state`: what a snapshot of all changes holds."""
        return self.live.state()

    def restore_state(self, state: Mapping[str, pa.Table]) -> None:
        """As `LiveTrie.restore_state`, on a retriever of the same release that has taken no change."""
        self.live.restore_state(state)

    def _put(self, newcomers: Sequence[Newcomer], codes_ML, columns, *, check_only: bool, **options) -> None:
        newcomers, products = list(newcomers), self.products
        products.check_newcomers(newcomers, complete=False)
        wanting = [at for at, one in enumerate(newcomers) if one.vector_D is None]
        if products.base_vectors is not None and wanting:
            # Only to be checked, any vector will do: its title's fits.
            vector_MD = np.zeros((len(wanting), products.base_vectors.width), np.float32)
            if not check_only:
                vector_MD = self._title_vectors([newcomers[at].title for at in wanting])
            for at, vector_D in zip(wanting, vector_MD):
                newcomers[at] = replace(newcomers[at], vector_D=vector_D)
        self.live.put(newcomers, codes_ML, columns, check_only=check_only, **options)

    def _title_vectors(self, titles: list[str]) -> np.ndarray:
        """float32 M×D, as the release's products have them."""
        vectors = []
        # One by one, so that a vector does not depend on who comes beside it.
        for title in titles:
            dense_BE = None if self.encode_query else getattr(self._encoded([title])[2], "dense_BE", None)
            vectors.append(np.asarray(self._vectors([title], dense_BE, of="products")[0], np.float32))
        return np.stack(vectors)


def _of_part(soft: Soft, part: slice) -> Soft:
    """For some of the queries, which are then numbered from 0 on."""
    return soft._replace(
        deadlines=soft.deadlines[part],
        answered=lambda row, hits, levels: soft.answered(part.start + row, hits, levels),
    )
