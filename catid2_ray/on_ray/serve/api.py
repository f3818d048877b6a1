"""Requests and responses of the HTTP interface: queries, and the changes that a serving release takes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from catid2_ray.generator.users import User
from catid2_ray.on_ray.serve.refusals import MOST_NODES, sound
from catid2_ray.retrieval.rescoring import Hit
from catid2_ray.retrieval.retriever import MAX_K

MOST = 1000  # products of one request
MOST_QUERIES = 64  # of one request
MOST_SAID = 100  # attributes, and recent products, of a user
Said = Annotated[str, Field(min_length=1, max_length=200)]


class _Sound(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_and_finite(cls, values):
        return sound(values, nodes=MOST_NODES)


class RetrieveRequest(_Sound):
    query: str | None = Field(None, description="what the shopper typed")
    queries: list[str] | None = Field(
        None, min_length=1, max_length=MOST_QUERIES, description="in place of `query`: several, answered in `answers`"
    )
    k: int = Field(10, strict=True, description="products to return, 1 to 1000")
    filter: dict | None = Field(
        None, description='an expression over the release\'s filter columns, such as {"column": "price", "to": 20}'
    )
    beam_width: int | None = Field(
        None, strict=True, ge=1, le=MAX_K, description="IDs kept at every level; null = as the release says. Wider finds more "
        "and takes longer",
    )  # fmt: skip
    mode: Literal["ids", "clusters", "everything"] = Field(
        "ids", description="ids: products with their IDs. clusters: the beginnings of IDs that the search finds, in place of "
        "products. everything: products, each with `explain`, and in `clusters` the beginnings of IDs below which they were found"
    )  # fmt: skip
    explain: bool = Field(False, description="say of each product how its ID was found and what its score is made of")
    user: list[Said] | None = Field(
        None, max_length=MOST_SAID, description="attributes of who asks, such as 'age 20-29', in the words of the training pairs. "
        "Only a generator that was trained with users reads them: the answer says so in `personal`"
    )  # fmt: skip
    recent: list[Said] | None = Field(
        None,
        max_length=MOST_SAID,
        description="product_ids that who asks looked at before, the latest last; read as `user` is",
    )
    timeout_s: float | None = Field(
        None, gt=0, description="seconds that the caller waits: a query whose search has not begun by then is not searched (504). "
        "The header x-request-timeout-seconds says the same; the shorter one counts",
    )  # fmt: skip
    soft_timeout: float | None = Field(
        None, gt=0, description="seconds after which a search that still runs ends at the level reached: the answer holds what "
        "ranks best below its beams by vectors, and says so in `degraded`. Without effect where the release has no vectors",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_or_several(self):
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either `query` or `queries`")
        if self.explain and self.mode == "clusters":
            raise ValueError("explain: only products are explained, not clusters")
        if self.explains and self.soft_timeout is not None:
            raise ValueError("soft_timeout: to explain an answer takes further searches; ask for one of the two")
        return self

    @property
    def explains(self) -> bool:
        return self.explain or self.mode == "everything"

    @property
    def asker(self) -> User | None:
        """Who asks; None where nothing is known of them."""
        return User(tuple(self.user or ()), tuple(self.recent or ())) if self.user or self.recent else None

    def each(self) -> list["RetrieveRequest"]:
        """One request per query."""
        if self.queries is None:
            return [self]
        return [self.model_copy(update={"query": query, "queries": None}) for query in self.queries]


class Level(BaseModel):
    token: str
    logp: float | None = Field(
        description="natural log of P(ID up to this token | query); null where the search does not ask the generator"
    )
    score: float = Field(
        description="what the search chose the ID up to this token by: logp, or where it looks ahead S"
    )


class Explain(BaseModel):
    levels: list[Level] = Field(description="those searched; fewer of a product that has gone meanwhile")
    terms: dict[str, float] = Field(
        description="what each part of the mixture adds to the score: path, and where the release re-scores dense and BM25"
    )


class Product(BaseModel):
    product_id: str
    docid: str = Field(description="semantic ID, such as <a_65><b_225><c_205><d_19>")
    score: float = Field(
        description="what ranks the product: logp, where the search looks ahead S of its ID, where the release re-scores the final "
        "score"
    )
    logp: float | None = Field(
        description="natural log of P(ID | query); of its prefix where the search stops early; null where the search does not "
        "ask the generator"
    )
    dense: float | None = Field(description="product of query and product vector, where the release re-scores by it")
    lexical: float | None = Field(description="BM25, where the release re-scores by it")
    title: str | None
    category_path: list[str] | None = Field(
        description="root first; null where the product has none, or category_path is no filter column of the release"
    )
    explain: Explain | None = None

    @classmethod
    def of(cls, hit: Hit, **more) -> "Product":
        names = ("product_id", "score", "logp", "dense", "lexical", "title")
        return cls(docid=hit.docid_text, **{name: getattr(hit, name) for name in names}, **more)


class Cluster(BaseModel):
    prefix: str = Field(description="the beginning of an ID, such as <a_65><b_225>")
    score: float = Field(description="what the search found it by: logp, or where it looks ahead S")
    logp: float | None = Field(
        description="natural log of P(prefix | query); null where the search does not ask the generator"
    )
    products: int = Field(description="products below it that can be found now, whether they pass the filter or not")


class Degraded(BaseModel):
    reason: Literal["soft_timeout"] = Field(description="soft_timeout: that time was over before the search ended")


class Answer(BaseModel):
    products: list[Product] = Field(description="best first; empty where clusters alone were asked for")
    clusters: list[Cluster] | None = Field(
        None, description="where they were asked for: best first; of everything, in the order of their best products"
    )
    degraded: Degraded | None = Field(None, description="why the answer is worse than the release's best")
    coverage: float | None = Field(
        None, description="of a degraded answer: levels of the ID that were searched, as a share of all its levels"
    )
    fewer: Literal["search", "catalogue"] | None = Field(
        description="why there are fewer products than k: search = the beams hold no more; catalogue = no more products are there "
        "or pass the filter; null where there are k"
    )


class RetrieveResponse(Answer):
    release: str
    personal: bool | None = Field(
        None, description="of a request with `user` or `recent`: whether the release's search reads any of them"
    )
    answers: list[Answer] | None = Field(
        None, description="where `queries` were asked: one for each, in their order; `products` is empty then"
    )


class ProductResponse(BaseModel):
    release: str
    product_id: str
    docid: str
    title: str | None
    category_path: list[str] | None = Field(
        description="root first; null where the product has none, or category_path is no filter column of the release"
    )
    columns: dict[str, Any] = Field(
        description="its values of the release's filter columns as they are now; null where one is missing"
    )
    live: bool = Field(description="false: it was withdrawn or deleted, so that no search finds it")


class HealthResponse(BaseModel):
    status: str
    release: str
    changes: int = Field(description="changes to products that this replica has applied")


class ReadyResponse(BaseModel):
    status: str
    release: str


class OnTrial(BaseModel):
    release: str
    percent: float = Field(description="of the sessions (x-session-id, else the query) are answered from it")
    shadow: float = Field(description="per cent of the other sessions ask it beside, for metrics alone")


class Churn(BaseModel):
    base: str = Field(description="the release before, which this one was built on")
    changed: int = Field(description="products of both that have another ID now")
    new: int = Field(description="products that the release before lacked")
    left: int = Field(description="products that only the release before had")

    @classmethod
    def of(cls, ids: Mapping) -> "Churn | None":
        """`ids`: metrics of a release's IDs. None where there was no release before, or its IDs are not followed."""
        if (churn := ids.get("churn")) is None:
            return None
        after = churn["after"]
        changed = round(after["prefix_churn"][-1] * after["common"])
        return cls(base=ids["base"], changed=changed, new=after["new"], left=after["retired"])


class ReleaseResponse(BaseModel):
    release: str
    created: str = Field(description="when it was published, in UTC")
    churn: Churn | None = Field(
        description="what changed when it was published; null where the release does not know: it is the first, or the one before "
        "has IDs of another kind"
    )
    changes: int = Field(description="changes to products that this replica has applied")
    products: int = Field(description="products that can be found now")
    users: bool = Field(description="whether a query's `user` and `recent` are read")
    levels: int = Field(description="codes of a whole ID")
    filters: dict[str, str] = Field(description="columns that a filter may name, and the type of their values")
    follows: bool = Field(description="whether this replica changes to a release that becomes current")
    refused: str | None = Field(
        description="the current release where this replica refuses to serve it, and why; null: none"
    )
    trial: OnTrial | None = Field(description="a release on trial beside this one; null: none")
    trial_refused: str | None = Field(description="a release that was to be on trial, and why it is not; null: none")


class NextCode(BaseModel):
    token: str
    products: int


class Category(BaseModel):
    path: list[str]
    products: int


class Word(BaseModel):
    word: str
    products: int


class Member(BaseModel):
    product_id: str
    docid: str
    title: str | None


class BelowResponse(BaseModel):
    release: str
    prefix: str
    count: int = Field(description="products below the prefix that can be found now")
    next_codes: list[NextCode] = Field(description="of the next level, most products first, 10 at most")
    categories: list[Category] = Field(
        description="most products first, 10 at most; none where category_path is no filter column of the release"
    )
    words: list[Word] = Field(
        description="of titles, those that most products have, 10 at most; where more than 2,000 products lie below, 2,000 are read"
    )
    products: list[Member] = Field(description="10 at most, in the order of their IDs")


class PutProduct(_Sound):
    product_id: str = Field(min_length=1)
    title: str | None = Field(None, min_length=1, description="needed where the product is not live")
    description: str | None = Field(None, description="for the vector, if none is given")
    category_path: list[str] = Field(
        [],
        description="root first; for the vector and the ID, if none are given, and for the filter column of that name",
    )
    docid: str | None = Field(
        None,
        description="a free semantic ID; none = that of the release's quantizer, or the nearest free one beside it",
    )
    vector: list[float] | None = Field(None, description="by the encoder of the products; none = made of the text")
    value: float | None = Field(None, description="what the product is worth to the business")
    columns: dict = Field(
        {},
        description="values of the release's filter columns. Those left out stay as they are; of a product that is new, or whose "
        "text changes, they are missing",
    )


class PutRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # products are checked one by one
    products: list[PutProduct] = Field(min_length=1, max_length=MOST)


class NewProduct(PutProduct):
    title: str = Field(min_length=1)


class InsertRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # products are checked one by one
    products: list[NewProduct] = Field(min_length=1, max_length=MOST)


class NamesRequest(_Sound):
    product_ids: list[str] = Field(min_length=1, max_length=MOST)


class ChangeResponse(BaseModel):
    release: str = Field(description="that the change was made on; younger releases carry it over")
    change: int = Field(description="its number; /healthz of a replica tells how many it has applied")


class Inserted(BaseModel):
    product_id: str
    docid: str


class InsertResponse(ChangeResponse):
    products: list[Inserted]


class Put(Inserted):
    did: Literal["inserted", "replaced", "changed", "unchanged"] = Field(
        description="replaced: its text is another, so it has a new row; changed: in place"
    )


class PutResponse(ChangeResponse):
    products: list[Put] = Field(description="in the order of the request")
