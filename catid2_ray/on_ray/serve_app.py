"""The online side: a Ray Serve application that answers POST /v1/retrieve from the store's current release.

One deployment is ingress and retriever at once, so a request crosses one queue. Requests are batched inside a replica; a
request's answer does not depend on its batch mates. Health is a real query through the same path, with a deadline.
"""

import asyncio
import time
from typing import Literal

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe
from catid2_ray.errors import QueryError, RecipeError
from catid2_ray.on_ray import cluster
from catid2_ray.retrieval.retriever import Retriever

CANARY_QUERY, CANARY_DEADLINE_S = "canary", 10.0
MAX_ONGOING, MAX_QUEUED = 64, 256

api = FastAPI(title="catid2-ray retriever", docs_url="/docs")


class RetrieveRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    query: str = Field(description="what the shopper typed")
    k: int = Field(10, description="products to return, 1 to 1000")


class Product(BaseModel):
    product_id: str
    docid: str = Field(description="semantic ID, such as <a_65><b_225><c_205><d_19>")
    score: float = Field(description="natural log of P(ID | query)")
    title: str | None


class RetrieveResponse(BaseModel):
    release: str
    products: list[Product] = Field(description="best first")


class AppSettings(BaseModel):
    """Arguments of the application, as in serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")
    store: str = Field(description="folder or s3:// prefix of the store")
    release: str | None = Field(None, description="name of a release; none = the current one when a replica starts")
    threads: int = Field(1, ge=1, description="torch threads of a replica")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the generator runs")


@api.exception_handler(QueryError)
async def _unanswerable(request: Request, error: QueryError) -> JSONResponse:
    return JSONResponse(status_code=422, content={"error": str(error)})


@serve.deployment(
    name="Retriever",
    max_ongoing_requests=MAX_ONGOING,
    max_queued_requests=MAX_QUEUED,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16},
    health_check_period_s=10,
    health_check_timeout_s=30,
    user_config={"max_batch_size": 16, "batch_wait_timeout_s": 0.005},
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(api)
class RetrieverReplica:
    """Loads a release, checks its parts against each other, answers one query to warm up, then turns ready."""

    def __init__(self, settings: AppSettings):
        torch.set_num_threads(settings.threads)
        store = Store(settings.store)
        release = releases.load(store, settings.release) if settings.release else releases.current(store)
        self.retriever = Retriever.open(
            releases.release_folder(store, release, releases.default_cache()), device=settings.device
        )
        self.release = release.name
        self.retriever.retrieve([CANARY_QUERY], k=1)

    def reconfigure(self, user_config: dict) -> None:
        if user_config["max_batch_size"] > MAX_ONGOING:
            raise RecipeError(
                f"user_config.max_batch_size {user_config['max_batch_size']} exceeds max_ongoing_requests {MAX_ONGOING}: "
                "such a batch could never fill"
            )
        self._answer.set_max_batch_size(user_config["max_batch_size"])
        self._answer.set_batch_wait_timeout_s(user_config["batch_wait_timeout_s"])

    async def check_health(self) -> None:
        await asyncio.wait_for(asyncio.to_thread(self.retriever.retrieve, [CANARY_QUERY], k=1), CANARY_DEADLINE_S)

    @api.get("/healthz")
    async def healthz(self) -> dict:
        return {"status": "ok", "release": self.release}

    @api.post("/v1/retrieve")
    async def retrieve(self, request: RetrieveRequest) -> RetrieveResponse:
        self.retriever.check(request.query, k=request.k)
        hits = await self._answer((request.query, request.k))
        products = [
            Product(product_id=hit.product_id, docid=hit.docid_text, score=hit.score, title=hit.title) for hit in hits
        ]
        return RetrieveResponse(release=self.release, products=products)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def _answer(self, requests: list[tuple[str, int]]) -> list:
        return await asyncio.to_thread(self._search, requests)

    def _search(self, requests: list[tuple[str, int]]) -> list:
        """Requests of one beam width go together: a k above the beam widens it, and must not widen it for others."""
        beam, answers = self.retriever.beam_width, [None] * len(requests)
        for width in sorted({max(beam, k) for _, k in requests}):
            group = [number for number, (_, k) in enumerate(requests) if max(beam, k) == width]
            found = self.retriever.retrieve(
                [requests[number][0] for number in group], k=max(requests[n][1] for n in group)
            )
            for number, hits in zip(group, found):
                answers[number] = hits[: requests[number][1]]
        return answers


def build(settings: AppSettings):
    """The application that serve_config.yaml names."""
    return RetrieverReplica.bind(settings)


def serve_here(store: str, *, host: str, port: int) -> None:
    """Serve on this machine until interrupted. Fails before Ray starts when nothing was published."""
    opened = Store(store)
    opened.check()
    release = releases.current(opened)
    releases.release_folder(opened, release, releases.default_cache())
    cluster.connect(ClusterRecipe())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(AppSettings(store=opened.uri)), name="catid2")
        print(
            f"serving release {release.name} on http://{host}:{port}  (POST /v1/retrieve, GET /healthz, GET /docs); "
            "Ctrl-C ends it",
            flush=True,
        )
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("shutting down")
    finally:
        serve.shutdown()
        cluster.disconnect()
