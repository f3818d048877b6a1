"""Requests and responses of the HTTP interface: queries, and the changes that a serving release takes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from catid2_ray.on_ray.serve.refusals import MOST_NODES, sound
from catid2_ray.retrieval.rescoring import Hit

MOST = 1000  # products of one request


class _Sound(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_and_finite(cls, values):
        return sound(values, nodes=MOST_NODES)


class RetrieveRequest(_Sound):
    query: str = Field(description="what the shopper typed")
    k: int = Field(10, strict=True, description="products to return, 1 to 1000")
    filter: dict | None = Field(
        None, description='an expression over the release\'s filter columns, such as {"column": "price", "to": 20}'
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

    @classmethod
    def of(cls, hit: Hit) -> "Product":
        names = ("product_id", "score", "logp", "dense", "lexical", "title")
        return cls(docid=hit.docid_text, **{name: getattr(hit, name) for name in names})


class RetrieveResponse(BaseModel):
    release: str
    products: list[Product] = Field(description="best first")
    fewer: Literal["search", "catalogue"] | None = Field(
        description="why there are fewer than k: search = the beams of this release hold no more; catalogue = no more products are "
        "there or pass the filter; null where there are k"
    )


class HealthResponse(BaseModel):
    status: str
    release: str
    changes: int = Field(description="changes to products that this replica has applied")


class ReadyResponse(BaseModel):
    status: str
    release: str


class ReleaseResponse(BaseModel):
    release: str
    created: str = Field(description="when it was published, in UTC")
    changes: int = Field(description="changes to products that this replica has applied")
    products: int = Field(description="products that can be found now")
    levels: int = Field(description="codes of a whole ID")
    filters: dict[str, str] = Field(description="columns that a filter may name, and the type of their values")
    follows: bool = Field(description="whether this replica changes to a release that becomes current")
    refused: str | None = Field(
        description="the current release where this replica refuses to serve it, and why; null: none"
    )


class NextCode(BaseModel):
    token: str
    products: int


class Category(BaseModel):
    path: list[str]
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
    products: list[Member] = Field(description="10 at most, in the order of their IDs")


class NewProduct(_Sound):
    product_id: str = Field(min_length=1)
    title: str = Field(min_length=1)
    description: str | None = Field(None, description="for the vector, if none is given")
    category_path: list[str] = Field([], description="root first; for the vector and the ID, if none are given")
    docid: str | None = Field(
        None,
        description="a free semantic ID; none = that of the release's quantizer, or the nearest free one beside it",
    )
    vector: list[float] | None = Field(None, description="by the encoder of the products; none = made of the text")
    value: float | None = Field(None, description="what the product is worth to the business")
    columns: dict = Field({}, description="values of the release's filter columns; those left out are missing values")


class InsertRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # products are checked one by one
    products: list[NewProduct] = Field(min_length=1, max_length=MOST)


class NamesRequest(_Sound):
    product_ids: list[str] = Field(min_length=1, max_length=MOST)


class ChangeResponse(BaseModel):
    release: str = Field(description="that the change was made on; a later release does not have it")
    change: int = Field(description="its number; /healthz of a replica tells how many it has applied")


class Inserted(BaseModel):
    product_id: str
    docid: str


class InsertResponse(ChangeResponse):
    products: list[Inserted]
