"""The online side: a Ray Serve application that answers POST /v1/retrieve from the store's current release.

One deployment is ingress and retriever at once, so a request crosses one queue. Requests are batched inside a replica; a
request's answer does not depend on its batch mates. Health is a real query through the same path, with a deadline.
Changes of products go through a series in the store (`live_log.py`), which every replica follows.
"""

import asyncio
import socket
import time
from pathlib import Path
from typing import Literal

import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts import uses
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe
from catid2_ray.errors import InputError, QueryError, RecipeError
from catid2_ray.on_ray.machine import cluster, progress
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.serve import reference
from catid2_ray.on_ray.serve.api import (
    BelowResponse,
    Category,
    ChangeResponse,
    HealthResponse,
    Inserted,
    InsertRequest,
    InsertResponse,
    Member,
    NamesRequest,
    NextCode,
    Product,
    ReadyResponse,
    ReleaseResponse,
    RetrieveRequest,
    RetrieveResponse,
)
from catid2_ray.on_ray.serve.newcomers import Newcomers
from catid2_ray.on_ray.serve.refusals import RESPONSES, install, refused
from catid2_ray.retrieval.below import below
from catid2_ray.retrieval.live_view import codes_of

CANARY_QUERY, CANARY_DEADLINE_S = "canary", 10.0
MAX_ONGOING, MAX_QUEUED = 64, 256

PAGE = Path(__file__).with_name("page.html")

api = FastAPI(title="catid2-ray retriever", docs_url=None, redoc_url=None)
install(api)


class AppSettings(BaseModel):
    """Arguments of the application, as in serve_config.yaml."""

    model_config = ConfigDict(extra="forbid")
    store: str = Field(description="folder or s3:// prefix of the store")
    release: str | None = Field(
        None,
        description="name of a release; none = the current one when it is deployed: all replicas then serve that one",
    )
    threads: int = Field(1, ge=1, description="torch threads of a replica")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the generator and the query encoder run")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="numbers of the generator")
    weights: Literal["float32", "int8"] | None = Field(None, description="none = as the release was evaluated")
    normalize: Literal["level", "vocabulary"] | None = Field(None, description="none = as the release was evaluated")
    updates: bool = Field(True, description="accept POST /v1/products, /v1/withdraw and /v1/restore")
    poll_s: float = Field(1.0, gt=0, description="seconds between looks for changes that other replicas took")


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
        store, self.settings = Store(settings.store), settings
        release = releases.load(store, settings.release) if settings.release else releases.current(store)
        # Before it is opened: gc keeps the releases that replicas name.
        self.use = uses.served(store, release.name, command="catid2 serve", say=progress.event)
        self.retriever = open_retriever(
            releases.release_folder(store, release, releases.default_cache()), device=settings.device,
            dtype=settings.dtype, weights=settings.weights, normalize=settings.normalize,
        )  # fmt: skip
        self.release, self.created = release.name, release.created
        self.newcomers = Newcomers(store, release.manifests(store))
        self.updates = LiveUpdates(self.retriever, LiveLog(store, release.name))
        self.updates.catch_up()
        self.updates.follow(settings.poll_s)
        self.retriever.retrieve([CANARY_QUERY], k=1)

    def __del__(self):
        """Serve calls it when a replica is stopped; one that is killed is forgotten after a while."""
        if hasattr(self, "use"):
            self.use.end()

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

    @api.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page to try the release in a browser; it loads nothing from elsewhere."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @api.get("/docs", include_in_schema=False)
    async def docs(self) -> HTMLResponse:
        """What the interface takes and gives."""
        return HTMLResponse(reference.page(api.openapi()))

    @api.head("/", include_in_schema=False)
    @api.head("/healthz", include_in_schema=False)
    async def alive(self) -> Response:
        return Response()

    @api.get("/v1/release")
    async def which_release(self) -> ReleaseResponse:
        """Say what is served: the release, how many products can be found, and by what they can be filtered."""
        live = self.retriever.live
        return ReleaseResponse(
            release=self.release, created=self.created, changes=self.updates.applied, products=live.products,
            levels=self.retriever.trie.levels, filters=live.column_types,
        )  # fmt: skip

    @api.get("/healthz")
    async def healthz(self) -> HealthResponse:
        """Say which release this replica serves, and how many changes to products it has applied."""
        return HealthResponse(status="ok", release=self.release, changes=self.updates.applied)

    @api.get("/readyz", responses={503: RESPONSES[503]})
    async def readyz(self) -> ReadyResponse:
        """Answer a query to itself: a replica that can may take traffic, one that cannot says 503."""
        try:
            await self.check_health()
        except Exception as error:  # whatever it is, a caller gets an answer of the one shape
            return refused(503, f"this replica answers no query now ({type(error).__name__}: {error})")
        return ReadyResponse(status="ready", release=self.release)

    @api.get("/v1/docids/{prefix}", responses={422: RESPONSES[422]})
    async def docids(self, prefix: str) -> BelowResponse:
        """Say what lives below the first codes of an ID, such as <a_65><b_225>."""
        return await asyncio.to_thread(self._below, prefix)

    def _below(self, prefix: str) -> BelowResponse:
        retriever, view = self.retriever, self.retriever.live.view
        codes, space = retriever.space.parse_prefix(prefix), retriever.space
        seen = below(retriever.live, view, codes)
        tokens = [(space.text((*codes, code))[len(prefix) :], number) for code, number in seen.next_codes]
        members = zip(seen.rows, codes_of(view, seen.rows))
        names = retriever.products
        return BelowResponse(
            release=self.release, prefix=prefix, count=seen.products,
            next_codes=[NextCode(token=token, products=number) for token, number in tokens],
            categories=[Category(path=path, products=number) for path, number in seen.categories],
            products=[
                Member(product_id=names.name(row), docid=space.text(codes_L), title=names.title(row))
                for row, codes_L in members
            ],
        )  # fmt: skip

    @api.post("/v1/retrieve", responses=RESPONSES)
    async def retrieve(self, request: RetrieveRequest) -> RetrieveResponse:
        """Find the `k` best products for a query, among those that the filter allows."""
        self.retriever.check(request.query, k=request.k)
        if request.filter is not None:
            # Refused here, it cannot spoil a batch; it is kept for the search.
            await asyncio.to_thread(self.retriever.compile, request.filter)
        hits = await self._answer(request)
        fewer = None
        if len(hits) < request.k:
            fewer = await asyncio.to_thread(self.retriever.why_fewer, len(hits), k=request.k, expression=request.filter)
        return RetrieveResponse(release=self.release, products=[Product.of(hit) for hit in hits], fewer=fewer)

    @api.post("/v1/products", responses=RESPONSES)
    async def insert(self, request: InsertRequest) -> InsertResponse:
        """Add products to the release that is served. All replicas find them within seconds."""
        self._check_updates()
        asked = [product.model_dump() for product in request.products]

        def build() -> dict:
            vectors = self.retriever.products.base_vectors is not None
            made = self.newcomers.prepare(asked, self.retriever.live.view, vectors=vectors)
            return {"kind": "insert", "products": made}

        done = await asyncio.to_thread(self.updates.change, build)
        inserted = [Inserted(product_id=one["product_id"], docid=one["docid"]) for one in done["products"]]
        return InsertResponse(release=self.release, change=done["number"], products=inserted)

    @api.post("/v1/withdraw", responses=RESPONSES)
    async def withdraw(self, request: NamesRequest) -> ChangeResponse:
        """Hide products from all answers until they are restored."""
        return await self._change("withdraw", request.product_ids)

    @api.post("/v1/restore", responses=RESPONSES)
    async def restore(self, request: NamesRequest) -> ChangeResponse:
        """Show withdrawn products again."""
        return await self._change("restore", request.product_ids)

    async def _change(self, kind: str, product_ids: list[str]) -> ChangeResponse:
        self._check_updates()
        done = await asyncio.to_thread(self.updates.change, lambda: {"kind": kind, "products": product_ids})
        return ChangeResponse(release=self.release, change=done["number"])

    def _check_updates(self) -> None:
        if not self.settings.updates:
            raise QueryError("this deployment takes no changes (its setting `updates` is off)")

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def _answer(self, requests: list[RetrieveRequest]) -> list:
        return await asyncio.to_thread(self._search, requests)

    def _search(self, requests: list[RetrieveRequest]) -> list:
        """Requests of one beam width go together: a k above the beam widens it, and must not widen it for others."""
        beam, answers = self.retriever.beam_width, [None] * len(requests)
        for width in sorted({max(beam, request.k) for request in requests}):
            group = [number for number, request in enumerate(requests) if max(beam, request.k) == width]
            mine = [requests[number] for number in group]
            hits_of_group = self.retriever.retrieve(
                [one.query for one in mine], k=max(one.k for one in mine), filters=[one.filter for one in mine]
            )
            for number, hits in zip(group, hits_of_group):
                answers[number] = hits[: requests[number].k]
        return answers


def build(settings: AppSettings):
    """The application that serve_config.yaml names. It names the release, so that a replica which starts after a publication
    serves what the others serve. Ray builds the application again only where its configuration has changed: to serve another
    release, name it in `release`."""
    if settings.release is None:
        settings = settings.model_copy(update={"release": releases.current(Store(settings.store)).name})
    return RetrieverReplica.bind(settings)


def check_port(host: str, port: int) -> None:
    """Raise InputError where somebody listens already. Ray's proxies share a port (SO_REUSEPORT), and with it the requests."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        # A port whose last connections have just ended is free.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{host}:{port} cannot be listened on ({error.strerror}): end what listens there, or give --port"
            ) from None


def serve_here(store: str, *, host: str, port: int) -> None:
    """Serve on this machine until interrupted. Fails before Ray starts when nothing was published."""
    opened = Store(store)
    opened.check()
    release = releases.current(opened)
    releases.release_folder(opened, release, releases.default_cache())
    check_port(host, port)
    cluster.connect(ClusterRecipe())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(AppSettings(store=opened.uri, release=release.name)), name="catid2")
        print(
            f"serving release {release.name} on http://{host}:{port}  (a page; POST /v1/retrieve, GET /healthz, GET /docs); "
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
