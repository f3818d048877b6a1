"""From query text to products: tokenizer, constrained beam search, and the products of the rows that the IDs name.

Reads a plain folder (no store): `generator/` a saved model with its tokenizer, `trie/`, `products.arrow` memory-mapped
with rows in trie order, `retriever.json` with the settings. A k wider than the beam widens the beam.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from transformers import AutoTokenizer, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, QueryError, ReleaseError
from catid2_ray.generator.examples import tokenize
from catid2_ray.generator.vocabulary import PAD
from catid2_ray.retrieval.beam import BeamResult, constrained_beam_search
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie

MAX_K = 1000


@dataclass(frozen=True)
class Hit:
    """One product. `score`: natural log of P(ID | query); `title` is None where the retriever has no titles."""

    product_id: str
    docid_text: str
    score: float
    title: str | None = None


class Retriever:
    """Answers queries with products.

    `product_ids` and `titles`: one per trie row, in trie order (sequence or Arrow array). `query_tokens`: longer
    queries are cut. `batch`: queries per search at a beam of 100; wider beams take fewer, as memory grows with both.
    Raises ReleaseError when products and trie differ in length, InputError when the model does not fit the trie.
    """

    def __init__(
        self,
        model,
        tokenizer,
        trie: Trie,
        product_ids,
        *,
        titles=None,
        beam_width: int = 100,
        max_query_chars: int = 2000,
        query_tokens: int = 32,
        normalize: str = "level",
        release: str = "",
        batch: int = 32,
    ):
        self.decoder = (
            model if hasattr(model, "decode_step") else T5Decoder(model, codes_per_level=trie.codes_per_level)
        )
        self.tokenizer, self.trie, self.space = tokenizer, trie, DocidSpace(tuple(trie.codes_per_level))
        self.product_ids, self.titles = _column(product_ids), None if titles is None else _column(titles)
        self.beam_width, self.max_query_chars, self.query_tokens = beam_width, max_query_chars, query_tokens
        self.normalize, self.release, self.batch = normalize, release, batch
        for name, column in (("product ids", self.product_ids), ("titles", self.titles)):
            if column is not None and len(column) != trie.rows:
                raise ReleaseError(f"{len(column)} {name} for {trie.rows} trie rows; take both from one release")

    @classmethod
    def open(cls, folder, *, device: str = "cpu") -> "Retriever":
        """Load a folder laid out as at the top of this file. Raises ArtifactError or ReleaseError."""
        folder = Path(folder)
        missing = [
            name for name in ("retriever.json", "products.arrow", "generator", "trie") if not (folder / name).exists()
        ]
        if missing:
            raise ArtifactError(f"{folder} is no retriever: {', '.join(missing)} missing; publish the release again")
        try:
            settings = json.loads((folder / "retriever.json").read_text(encoding="utf-8"))
            products = pa.ipc.open_file(pa.memory_map(str(folder / "products.arrow"))).read_all()
            model = T5ForConditionalGeneration.from_pretrained(folder / "generator", use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder / "generator")
            ids, titles = products["product_id"], products["title"] if "title" in products.column_names else None
            codes_per_level = tuple(settings["codes_per_level"])
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"{folder} cannot be read ({type(error).__name__}: {error}); publish it again"
            ) from error
        trie = Trie.open(folder / "trie")
        if codes_per_level != tuple(trie.codes_per_level):
            raise ReleaseError(
                f"{folder}: retriever.json has codes per level {list(codes_per_level)}, the trie "
                f"{list(trie.codes_per_level)}; take both from one release"
            )
        return cls(
            model.eval().to(device),
            tokenizer,
            trie,
            ids,
            titles=titles,
            beam_width=settings.get("beam_width", 100),
            query_tokens=settings.get("query_tokens", 32),
            normalize=settings.get("normalize", "level"),
            release=settings.get("release", ""),
        )

    def check(self, query: str, *, k: int) -> None:
        """Raise QueryError for a query or a k that cannot be answered."""
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_K:
            raise QueryError(f"k must be a whole number from 1 to {MAX_K}, found {k!r}")
        if not isinstance(query, str) or not query.strip():
            raise QueryError(f"a query needs at least one character that is not blank, found {query!r}")
        if len(query) > self.max_query_chars:
            raise QueryError(f"a query may have {self.max_query_chars} characters, found {len(query)}; shorten it")

    def search(self, queries: Sequence[str], *, k: int, allowed=None) -> BeamResult:
        """The best k IDs of at most one batch of queries, as `constrained_beam_search` gives them."""
        ids_BT = tokenize(self.tokenizer, queries, length=self.query_tokens)
        mask_BT = ids_BT != PAD
        used = int(mask_BT.any(0).sum())
        return constrained_beam_search(
            self.decoder,
            self.trie,
            ids_BT[:, :used],
            mask_BT[:, :used],
            beam_width=max(self.beam_width, k),
            top_k=k,
            allowed=allowed,
            normalize=self.normalize,
        )

    def retrieve(self, queries: Sequence[str], *, k: int, allowed=None) -> list[list[Hit]]:
        """At most `k` products per query, best first; products of one ID in row order.

        `allowed`: a `Filter`, bool per trie row, or None for all. Raises QueryError when any query or k cannot be answered.
        """
        for query in queries:
            self.check(query, k=k)
        answers = []
        size = max(1, min(self.batch, self.batch * 100 // max(self.beam_width, k)))
        for start in range(0, len(queries), size):
            result = self.search(queries[start : start + size], k=k, allowed=allowed)
            answers += self._hits(result, k, allowed)
        return answers

    def _hits(self, result: BeamResult, k: int, allowed) -> list[list[Hit]]:
        """Rows of each result, expanded, filtered and cut, with their products."""
        picked = []
        ranges, docids, scores = result.row_range_BK2.tolist(), result.docid_BKL.tolist(), result.logp_BK.tolist()
        allows = allowed.allows if isinstance(allowed, Filter) else None if allowed is None else allowed.__getitem__
        for query, count in enumerate(result.count_B.tolist()):
            found = (
                (row, docid, score)
                for (first, end), docid, score in zip(ranges[query][:count], docids[query], scores[query])
                for row in range(first, end)
                if allows is None or allows(row)
            )
            picked.append([entry for entry, _ in zip(found, range(k))])
        # Row by row: `take` on a chunked column costs time in proportion to the catalogue, an index does not.
        return [
            [
                Hit(
                    self.product_ids[row].as_py(),
                    self.space.text(docid),
                    score,
                    None if self.titles is None else self.titles[row].as_py(),
                )
                for row, docid, score in entries
            ]
            for entries in picked
        ]


def _column(values) -> pa.ChunkedArray | pa.Array:
    return values if isinstance(values, (pa.ChunkedArray, pa.Array)) else pa.array(list(values), pa.string())
