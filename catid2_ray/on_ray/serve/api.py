"""Requests and responses of the changes that a serving release takes: new products, withdrawn ones, returned ones."""

from pydantic import BaseModel, ConfigDict, Field

MOST = 1000  # products of one request


class NewProduct(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
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
    model_config = ConfigDict(extra="forbid")
    products: list[NewProduct] = Field(min_length=1, max_length=MOST)


class NamesRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    product_ids: list[str] = Field(min_length=1, max_length=MOST)


class ChangeResponse(BaseModel):
    release: str = Field(description="that the change was made on; a later release does not have it")
    change: int = Field(description="its number; /healthz of a replica tells how many it has applied")


class Inserted(BaseModel):
    product_id: str
    docid: str


class InsertResponse(ChangeResponse):
    products: list[Inserted]
