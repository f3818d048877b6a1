"""The online side: a Ray Serve application that answers POST /v1/retrieve from the store's current release.

One deployment is ingress and retriever at once, so a request crosses one queue. Requests are batched inside a replica; a
request's answer does not depend on its batch mates. Health is a real query through the same path, with a deadline.
Changes of products go through a series in the store (`live_log.py`), which every replica follows.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Header, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe
from catid2_ray.errors import CatidError, InputError, QueryError, RecipeError, StorageError
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.canary import CANARY_QUERY
from catid2_ray.on_ray.serve import answers as answering
from catid2_ray.on_ray.serve import logs, metrics, reference, rpc
from catid2_ray.on_ray.serve.answers import Asked, Found
from catid2_ray.on_ray.serve.api import (
    Answer,
    BelowResponse,
    ChangeResponse,
    Churn,
    HealthResponse,
    Inserted,
    InsertRequest,
    InsertResponse,
    NamesRequest,
    OnTrial,
    ProductResponse,
    Put,
    PutRequest,
    PutResponse,
    ReadyResponse,
    ReleaseResponse,
    RetrieveRequest,
    RetrieveResponse,
)
from catid2_ray.on_ray.serve.batches import Batch, Batches
from catid2_ray.on_ray.serve.follow import Serving
from catid2_ray.on_ray.serve.keys import Keys, Locked
from catid2_ray.on_ray.serve.opened import Opened
from catid2_ray.on_ray.serve.puts import standing
from catid2_ray.on_ray.serve.refusals import Unserved, beside_text, install, refusals, refused
from catid2_ray.on_ray.serve.settings import AppSettings

# Requests wait in the replica, which takes the next batch at once and refuses beyond `most_waiting`. Those that wait at a proxy,
# because a replica has MAX_ONGOING, are tried again ever more rarely, up to 0.5 s apart: 400 at once took five times as long.
MAX_ONGOING, MAX_QUEUED = 384, 256
BATCHES = {"size": 16, "wait_s": 0.005, "most_waiting": 320}
FEW = 100  # products that are put into words without a thread
SESSION = "x-session-id"  # who asks: a session is answered from one release while another is on trial
BESIDE_S = 10.0  # after which a release on trial is not asked for metrics any more
PATIENCE_S = 3.0  # that a request to the store is tried: a caller waits for it, and a look at the store comes again
LAG_S = 60.0  # a replica that cannot apply changes for so long is replaced
# Threads of each kind of work, so that none waits behind another. Batches come one at a time.
THREADS = {"search": 1, "filters": 2, "explain": 1, "changes": 1, "health": 1}
# Calls of a kind that may be under way; further ones are refused. Changes wait long for a store that is away, explanations take
# searches of their own: none of them may fill the replica until nobody can search. 64 explanations are one request of 64 queries.
MOST_UNDER_WAY = {"filters": 320, "explain": 64, "changes": 64}

PAGE = Path(__file__).with_name("page.html")

api = FastAPI(title="catid2-ray retriever", docs_url=None, redoc_url=None)
install(api)
# The last one that is added comes first: a request is counted, its key is looked at, then its body is read.
api.add_middleware(Locked, keys=lambda: serve.get_replica_context().servable_object.keys)
api.add_middleware(metrics.Counted)
api.add_middleware(logs.Logged)

READ_REFUSALS = refusals(401)
RETRIEVE_REFUSALS = refusals(400, 401, 413, 422, 504)
CHANGE_REFUSALS = refusals(400, 401, 403, 409, 413, 422)
LOCAL = ("127.0.0.1", "localhost", "::1")


@serve.deployment(
    name="Retriever",
    max_ongoing_requests=MAX_ONGOING,
    max_queued_requests=MAX_QUEUED,
    backpressure_config={"retry_after_s": 1},
    max_surge_percent=100,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16},
    health_check_period_s=10,
    health_check_timeout_s=30,
    user_config={"max_batch_size": 16, "batch_wait_timeout_s": 0.005},
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(api)
class RetrieverReplica:
    """Loads a release, checks its parts against each other, answers one query to warm up, then turns ready."""

    canary_deadline_s = 20.0
    stuck_s = 300.0  # that the search of one batch may take: whoever asked has long gone
    canary: asyncio.Future | None = None  # that runs now, or ran last
    beside: asyncio.Future | None = None  # the same of a release on trial that is asked for metrics

    def __init__(self, settings: AppSettings):
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "device is cuda, but Ray gave this replica no GPU: ray_actor_options of the deployment must name num_gpus, or "
                "be left out"
            )
        torch.set_num_threads(settings.threads)
        if settings.logs == "json":
            logs.write_json()
        self.settings, self.keys = settings, Keys.of(settings.keys, needed=settings.needs_keys)
        self.pools = {name: ThreadPoolExecutor(threads, name) for name, threads in THREADS.items()}
        self.under_way = dict.fromkeys(THREADS, 0)
        self.batches = Batches(self._search, self.pools["search"], tell=self._tell, **BATCHES)
        self.answered = time.monotonic()  # when a search last came to its end
        self.serving = Serving(Store(settings.store, patience_s=PATIENCE_S), settings)
        self.serving.now.retriever.retrieve([CANARY_QUERY], k=1)

    def __del__(self):
        """Serve calls it when a replica is stopped; one that is killed is forgotten after a while."""
        if hasattr(self, "serving"):
            self.serving.end()

    async def _run(self, pool: str, work: Callable, *arguments, deadline: float | None = None) -> Any:
        """`work` in a thread of the pool. Raises Unserved: 503 beyond MOST_UNDER_WAY, 504 where `deadline`, a time of
        `time.monotonic()`, is over before the work begins."""
        if self.under_way[pool] >= MOST_UNDER_WAY.get(pool, MAX_ONGOING):
            raise Unserved(503, f"{self.under_way[pool]} calls of this kind are under way already: try again")

        def in_time():
            if deadline is not None and deadline <= time.monotonic():
                raise Unserved(504, "the time that this request was given is over")
            return work(*arguments)

        self.under_way[pool] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pools[pool], in_time)
        finally:
            self.under_way[pool] -= 1

    def reconfigure(self, user_config: dict) -> None:
        if user_config["max_batch_size"] > MAX_ONGOING:
            raise RecipeError(
                f"user_config.max_batch_size {user_config['max_batch_size']} exceeds max_ongoing_requests {MAX_ONGOING}: "
                "such a batch could never fill"
            )
        self.batches.size, self.batches.wait_s = user_config["max_batch_size"], user_config["batch_wait_timeout_s"]

    async def check_health(self) -> None:
        """A replica that answers is healthy, however long its queue; one that does not must answer a query in time, and so must its
        searches end. One that cannot apply the changes of its series is not: another may. A store that is away is no fault of a
        replica, nor a damaged record."""
        now, tried = self.serving.now, self.serving.trial
        updates = now.updates
        served = {one.name: one for one in (now, *([] if tried is None else [tried.opened]))}
        ages = {name: metrics.seconds_since(one.created) for name, one in served.items() if one.created}
        given_back = {name: one.given_back for name, one in served.items() if one.given_back is not None}
        metrics.put_by_release("catid2_release_age_s", ages)
        metrics.put_by_release("catid2_changes", {name: one.updates.applied for name, one in served.items()})
        metrics.put_by_release("catid2_lag_s", {name: one.updates.lag_s for name, one in served.items()})
        metrics.put_by_release("catid2_canary_recall", given_back)
        metrics.put("catid2_swaps", self.serving.swaps)
        metrics.put("catid2_waiting", self.batches.waiting)
        if updates.lag_s > LAG_S and not isinstance(updates.failing, StorageError | None):
            raise RuntimeError(
                f"changes have not been applied for {updates.lag_s:.0f} s: {updates.failing}; Serve replaces this replica"
            )
        if self.batches.searching_s > self.stuck_s:  # the canary has a thread of its own, and would not notice
            raise RuntimeError(
                f"a search has not ended for {self.batches.searching_s:.0f} s; Serve replaces this replica"
            )
        asked = time.monotonic()
        if self.canary is None or self.canary.done():  # one at a time, whoever asks
            self.canary = asyncio.ensure_future(self._run("health", self._ask_canary))
        try:
            await asyncio.wait_for(asyncio.shield(self.canary), self.canary_deadline_s)
        except TimeoutError:
            if self.answered < asked:
                raise

    def _ask_canary(self) -> None:
        self.serving.now.retriever.retrieve([CANARY_QUERY], k=1)
        self.answered = time.monotonic()

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

    @api.get("/v1/release", responses=READ_REFUSALS)
    async def which_release(self) -> ReleaseResponse:
        """Say what is served: the release, how many products can be found, and by what they can be filtered."""
        now, refusal, tried = self.serving.now, self.serving.refused, self.serving.trial
        not_tried = self.serving.trial_refused
        live = now.retriever.live
        return ReleaseResponse(
            release=now.name, created=now.created, churn=Churn.of(now.parts["ids"].metrics),
            changes=now.updates.applied, products=live.products, users=now.retriever.reads_users, levels=now.retriever.trie.levels,
            filters=live.column_types, follows=self.settings.follows,
            refused=None if refusal is None else f"{refusal[0]}: {refusal[1]}",
            trial=None if tried is None else OnTrial(release=tried.opened.name, **tried.shares._asdict()),
            trial_refused=None if not_tried is None else f"{not_tried[0]}: {not_tried[1]}",
        )  # fmt: skip

    @api.get("/healthz", responses=refusals())
    async def healthz(self) -> HealthResponse:
        """Say which release this replica serves, and how many changes to products it has applied."""
        now = self.serving.now
        return HealthResponse(status="ok", release=now.name, changes=now.updates.applied)

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", responses=refusals())
    async def readyz(self) -> ReadyResponse:
        """Answer a query to itself: a replica that can may take traffic, one that cannot says 503."""
        try:
            await self.check_health()
        except Exception as error:  # whatever it is, a caller gets an answer of the one shape
            return refused(503, f"this replica answers no query now ({type(error).__name__}: {error})")
        return ReadyResponse(status="ready", release=self.serving.now.name)

    @api.get("/metrics", responses=beside_text(READ_REFUSALS), response_class=PlainTextResponse)
    async def counted(self) -> PlainTextResponse:
        """Say what the replica that answers has counted, in Prometheus's text format; Ray exports the same of all replicas."""
        return PlainTextResponse(metrics.text())

    @api.get("/v1/docids/{prefix}", responses=refusals(401, 422))
    async def docids(self, prefix: str) -> BelowResponse:
        """Say what lives below the first codes of an ID, such as <a_65><b_225>."""
        return await self._run("filters", answering.below_of, self.serving.now, prefix)

    @api.get("/v1/products/{product_id:path}", responses=refusals(401, 404, 422))
    async def product(self, product_id: str) -> ProductResponse:
        """Say what the release knows of a product, whether it can be found now or was withdrawn."""
        return await self._run("filters", answering.product_of, self.serving.now, product_id)

    # What was not asked for (clusters, answers, explain) is left out.
    @api.post("/v1/retrieve", responses=RETRIEVE_REFUSALS, response_model_exclude_defaults=True)
    async def retrieve(self, request: RetrieveRequest, asked: Request) -> RetrieveResponse:
        """Find the `k` best products for a query, or for each of several, among those that the filter allows."""
        return await self._retrieve(request, asked.headers)

    async def Retrieve(self, message, grpc_context):  # noqa: N802 (the name in retriever.proto)
        """The same over gRPC. A refusal is a status without a message: an exception would be a traceback in Ray's log."""
        began, code, headers = time.perf_counter(), rpc.OK, rpc.headers_of(grpc_context.invocation_metadata())
        try:
            self.keys.check(headers, "read")
            return rpc.message_of(await self._retrieve(rpc.request_of(message), headers))
        except Exception as error:
            code = rpc.code_of(error)
            grpc_context.set_code(code)
            grpc_context.set_details(str(error))
            if not isinstance(error, CatidError):
                raise
            return rpc.NOTHING
        finally:
            metrics.count("catid2_requests", call=rpc.SERVICE, status=code.name)
            took_ms = 1e3 * (time.perf_counter() - began)
            metrics.observe("catid2_request_ms", took_ms, call=rpc.SERVICE)
            if code != rpc.OK:
                with logs.of_request(headers):
                    error = code == rpc.code_of(Exception())
                    logs.event("request", error=error, call=rpc.SERVICE, status=code.name, ms=round(took_ms, 1))

    async def _retrieve(self, request: RetrieveRequest, headers: Mapping[str, str]) -> RetrieveResponse:
        # Chosen once: whatever becomes current meanwhile, this request is answered from one release.
        deadline, each = answering.deadline_of(request, headers), request.each()
        session = headers.get(SESSION) or each[0].query
        now = self.serving.chosen(session)
        soft = None if request.soft_timeout is None else time.monotonic() + request.soft_timeout
        for one in each:
            now.retriever.check(one.query, k=one.k)
        if request.filter is not None:
            # Refused here, it cannot spoil a batch; it is kept for the search.
            await self._run("filters", now.retriever.compile, request.filter, deadline=deadline)
        tasks = [asyncio.ensure_future(self._answer(Asked(now, one, soft), deadline)) for one in each]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # of what nobody waits for, nothing is searched
                task.cancel()
            raise
        self._ask_beside(now, session, each, answers)
        personal = None if request.asker is None else now.retriever.reads(request.asker)
        if request.queries is None:
            return RetrieveResponse(release=now.name, personal=personal, **dict(answers[0]))
        return RetrieveResponse(release=now.name, personal=personal, products=[], fewer=None, answers=answers)

    async def _answer(self, asked: Asked, deadline: float | None) -> Answer:
        began = time.perf_counter()
        (now, request, _), found = asked, await self.batches.ask(asked, deadline=deadline)
        metrics.count("catid2_answers", release=now.name)
        metrics.observe("catid2_answer_ms", 1e3 * (time.perf_counter() - began), release=now.name)
        if request.explains or request.k > FEW or len(found.hits) < request.k:
            # To explain takes further searches: requests with filters must not wait for them.
            pool = "explain" if request.explains else "filters"
            answer = await self._run(pool, answering.answer_of, now, request, found, deadline=deadline)
        else:
            answer = answering.answer_of(now, request, found)
        metrics.count("catid2_empty_answers", not found.hits)
        if answer.degraded:
            metrics.count("catid2_degraded_answers", reason=answer.degraded.reason)
        if answer.fewer:
            metrics.count("catid2_fewer_answers", reason=answer.fewer)
        return answer

    def _ask_beside(self, now: Opened, session: str, each: list[RetrieveRequest], answers: list[Answer]) -> None:
        """Ask the release on trial the same, for metrics alone: one request at a time, and only while nobody waits."""
        tried = self.serving.trial
        if tried is None or now is tried.opened or not tried.shadows(session):
            return
        if not self.batches.waiting and (self.beside is None or self.beside.done()):
            self.beside = asyncio.ensure_future(self._compare(tried.opened, each, answers))

    async def _compare(self, tried: Opened, each: list[RetrieveRequest], answers: list[Answer]) -> None:
        for request, answer in zip(each, answers):
            if not answer.products or answer.degraded:
                continue
            began = time.perf_counter()
            try:
                if request.filter is not None:  # refused here, it cannot spoil a batch
                    await self._run("filters", tried.retriever.compile, request.filter)
                found = await self.batches.ask(Asked(tried, request), deadline=time.monotonic() + BESIDE_S)
            except Exception:  # such as a filter by a column that it lacks; nobody waits for this answer
                metrics.count("catid2_shadow_failures", release=tried.name)
                continue
            metrics.observe("catid2_shadow_ms", 1e3 * (time.perf_counter() - began), release=tried.name)
            both = {product.product_id for product in answer.products} & {hit.product_id for hit in found.hits}
            metrics.observe("catid2_shadow_overlap", len(both) / len(answer.products), release=tried.name)

    @api.put("/v1/products", responses=CHANGE_REFUSALS)
    async def put(
        self, request: PutRequest, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None
    ) -> PutResponse:
        """Insert products, or update those that are live: all of it or nothing. Prices, stock and other columns change in place; a
        product whose text changes keeps its ID. The same content again changes nothing."""
        self._check_updates()
        asked, now = [product.model_dump() for product in request.products], self.serving.now
        done = await self._run("changes", lambda: now.puts.put(asked, key=idempotency_key))
        return PutResponse(release=now.name, change=done.number, products=[Put(**one) for one in done.products])

    @api.post("/v1/products", responses=CHANGE_REFUSALS, deprecated=True)
    async def insert(self, request: InsertRequest) -> InsertResponse:
        """Add products that are not live yet. PUT takes its place: this call will go with the next minor version."""
        self._check_updates()
        asked, now = [product.model_dump() for product in request.products], self.serving.now

        def made() -> dict:
            vectors = now.retriever.products.base_vectors is not None
            products = now.newcomers.prepare(asked, now.retriever.live.view, vectors=vectors)
            return {"kind": "insert", "products": products}

        done = await self._run("changes", now.updates.change, made)
        inserted = [Inserted(product_id=one["product_id"], docid=one["docid"]) for one in done["products"]]
        return InsertResponse(release=now.name, change=done["number"], products=inserted)

    @api.post("/v1/withdraw", responses=CHANGE_REFUSALS)
    async def withdraw(self, request: NamesRequest) -> ChangeResponse:
        """Take products out of every answer. All replicas do so within seconds. Those that are out already stay out."""
        return await self._change("withdraw", request.product_ids)

    @api.post("/v1/restore", responses=CHANGE_REFUSALS)
    async def restore(self, request: NamesRequest) -> ChangeResponse:
        """Bring withdrawn and deleted products back, with the IDs they had. Those that are live stay so."""
        return await self._change("restore", request.product_ids)

    @api.delete("/v1/products/{product_id:path}", responses=refusals(404) | CHANGE_REFUSALS)
    async def delete(self, product_id: str) -> ChangeResponse:
        """Take one product out of every answer, as /v1/withdraw does; again, it changes nothing. It is gone for good with the next
        release whose catalogue lacks it. Until then it keeps its ID, and /v1/restore or PUT brings it back."""
        return await self._change("withdraw", [product_id], missing=404)

    async def _change(self, kind: str, product_ids: list[str], *, missing: int = 422) -> ChangeResponse:
        self._check_updates()
        now = self.serving.now

        def made() -> dict | None:
            found = [standing(now.retriever, one) for one in product_ids]
            if missing == 404 and found[0].row is None:
                raise Unserved(404, f"release {now.name} has no product {product_ids[0]!r}")
            # What is so already need not be said again.
            if all(one.row is not None and one.live == (kind == "restore") for one in found):
                return None
            return {"kind": kind, "products": product_ids}

        done = await self._run("changes", now.updates.change, made)
        return ChangeResponse(release=now.name, change=now.updates.applied if done is None else done["number"])

    def _check_updates(self) -> None:
        takes = self.settings.updates
        if not (self.keys.any_writes if takes is None else takes):
            raise QueryError(
                "this deployment takes no changes: give it keys with the right to write (setting `keys`), or set `updates` to true"
            )

    def _search(self, requests: list[Asked], early: Callable[[int, Found], None]) -> list[Found]:
        answers = answering.search(requests, early)
        self.answered = time.monotonic()
        return answers

    def _tell(self, batch: Batch) -> None:
        metrics.count("catid2_dropped", batch.dropped)
        if batch.searched:
            metrics.observe("catid2_batch_size", batch.searched)
            metrics.observe("catid2_wait_ms", 1e3 * batch.waited_s)
            metrics.observe("catid2_search_ms", 1e3 * batch.search_s)


def build(settings: AppSettings):
    """The application that serve_config.yaml names. With `device` cuda each asks for a GPU. Where replicas do not follow, it
    names the release, so that one which starts after a publication serves what the others serve. RecipeError for a relative path:
    each replica would look for it in a folder of its node's."""
    for name, place in (("store", settings.store), ("keys", settings.keys)):
        if place and "://" not in place and not os.path.isabs(place):
            raise RecipeError(
                f"{name} {place!r} of the serve file is a relative path, but replicas have other working folders than yours: "
                "set it to an absolute path that every node reaches" + (", or to s3://…" if name == "store" else "")
            )
    if Keys.of(settings.keys):  # what is wrong with them is said here, not by replica after replica
        settings = settings.model_copy(update={"needs_keys": True})
    if settings.release is None and not settings.follow:
        settings = settings.model_copy(update={"release": releases.current(Store(settings.store)).name})
    deployment = RetrieverReplica
    if settings.device == "cuda":  # what serve_config.yaml says of ray_actor_options comes in its place
        deployment = deployment.options(ray_actor_options={"num_cpus": 1, "num_gpus": 1})
    return deployment.bind(settings)


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
    """Serve on this machine until interrupted. Fails before Ray starts when nothing was published. Changes are taken where only
    this machine can ask, and elsewhere with keys that may write."""
    opened = Store(store)
    opened.check()
    release = releases.current(opened)
    releases.release_folder(opened, release, releases.default_cache())
    updates = True if host in LOCAL and not Keys.of(None) else None
    check_port(host, port)
    cluster.connect(ClusterRecipe())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(AppSettings(store=opened.uri, updates=updates)), name="catid2")
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
