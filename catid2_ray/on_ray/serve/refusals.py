"""What a replica says when it cannot answer: one shape, `{"error": "…"}`, for every status. (What Ray's proxy answers itself, when
the queue is full or a deployment is away, is plain text.)

A request is refused here, before it can join a batch: a body that is too large, JSON that cannot be read, numbers that are not
finite, halves of characters. FastAPI's own answers to wrong requests would hold the request's values, of which NaN and halves
of characters cannot be written as JSON, so that a bad request would become a 500.
"""

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException

from catid2_ray.errors import CatidError, CommitConflict, InputError, StorageError

MOST_BYTES = {"/v1/retrieve": 2**20}  # of a body; other paths take products with vectors
MOST_BYTES_ELSEWHERE = 2**25
MOST_NODES = 20_000  # values, lists and objects of one filter
MOST_DEPTH = 64
# Of a refusal: 503 in whole seconds, as the header wants; 401 how to say who asks.
HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
_SHOWN = 5  # faults of a request that are named
_LONGEST = 2000  # characters of an error, which may quote the request


class Unserved(CatidError):
    """A request that is not served: `status` 401 or 403 because of its key, 404 because there is no such thing, 503 because too
    many wait already, 504 because its time is over."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Refusal(BaseModel):
    error: str = Field(description="what is wrong, where, and what to do about it")


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": meaning}
    for status, meaning in {
        400: "The body is no JSON",
        401: "The service has keys, and the request has none of them",
        403: "The key may not change products",
        404: "The release has no such product",
        409: "Somebody else changed the products meanwhile: send the change again",
        413: "The body is too large",
        422: "The query, k, filter or change cannot be answered",
        503: "The queue is full, or the store does not answer: try again later. Ray's proxy says so in plain text",
        504: "The time that the request was given ended before its search, or its explanation, began",
    }.items()
}


_PLAIN = {"text/plain": {"schema": {"type": "string"}}}
LATE: dict[str, Any] = {
    "description": "The time that the header x-request-timeout-seconds gave, or the proxy gives each request, is over; Ray's proxy "
    "says so in plain text",
    "content": _PLAIN,
}
RESPONSES[503]["content"] = _PLAIN  # of Ray's proxy, beside ours


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of a call that may be refused with these, and as any call by Ray's proxy."""
    return copy.deepcopy({status: RESPONSES[status] for status in (*statuses, 503)} | {408: LATE})


def beside_text(documented: Mapping[int | str, dict]) -> dict[int | str, dict[str, Any]]:
    """The same for a call that answers in plain text, of whose refusals FastAPI would say that they are text, too."""
    json_of = {"application/json": {"schema": {"$ref": f"#/components/schemas/{Refusal.__name__}"}}}
    return {
        status: {
            "description": one["description"],
            "content": one.get("content", {}) | (json_of if "model" in one else {}),
        }
        for status, one in documented.items()
    }


def sound(value: Any, *, nodes: int = MOST_NODES) -> Any:
    """The value as it came, of JSON types. Raises ValueError, which says where, for a number that is not finite and for a text with
    half a character; and for more than `nodes` parts or MOST_DEPTH levels."""
    level, depth = [("", value)], 0
    while level:
        depth, nodes = depth + 1, nodes - len(level)
        if nodes < 0 or depth > MOST_DEPTH:
            raise ValueError(f"too large: {MOST_NODES} values in {MOST_DEPTH} levels are the most")
        below: list[tuple[str, Any]] = []
        for where, part in level:
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{where[1:]}: {part} is no finite number")
            if isinstance(part, str) and not _is_whole(part):
                raise ValueError(f"{where[1:]}: holds half a character (a lone surrogate); send whole characters")
            if isinstance(part, dict):
                if not all(map(_is_whole, part)):
                    raise ValueError(f"{where[1:] or 'body'}: a name holds half a character; send whole characters")
                below += [(f"{where}.{name}", inner) for name, inner in part.items()]
            elif isinstance(part, list):
                below += [(f"{where}.{place}", inner) for place, inner in enumerate(part)]
        level = below
    return value


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class BodyLimit:
    """ASGI middleware: a body beyond its path's limit is a 413, whether or not it says its length."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, taken = get_route_path(scope), 0
        most = MOST_BYTES.get(path, MOST_BYTES_ELSEWHERE)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        way_out = "shorten it" if path in MOST_BYTES else "send the products in several requests"
        refusal = refused(413, f"the body may have {most:,} bytes; {way_out}")
        if said.isdigit() and int(said) > most:
            return await refusal(scope, receive, send)
        messages, more = [], True
        while more:  # read here, so that nothing has been answered when the limit is met
            messages.append(await receive())
            taken += len(messages[-1].get("body", b""))
            more = messages[-1].get("more_body", False)
            if taken > most:
                return await refusal(scope, receive, send)

        async def replayed():
            return messages.pop(0) if messages else await receive()

        return await self.app(scope, replayed, send)


class _Ascii(JSONResponse):
    """An error may quote what was sent, halves of characters too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def refused(status: int, error: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    shown = error if len(error) <= _LONGEST else error[:_LONGEST] + "…"
    return _Ascii(status_code=status, content={"error": shown}, headers=headers)


def _is_json(content_type: str) -> bool:
    """Whether FastAPI reads such a body as JSON."""
    kind = content_type.split(";")[0].strip().lower()
    return kind == "application/json" or kind.startswith("application/") and kind.endswith("+json")


def install(api: FastAPI) -> None:
    """Every error of `api` has the shape of Refusal."""
    api.add_middleware(BodyLimit)

    @api.exception_handler(InputError)
    async def unanswerable(request: Request, error: InputError) -> JSONResponse:
        return refused(422, str(error))

    @api.exception_handler(Unserved)
    async def not_served(request: Request, error: Unserved) -> JSONResponse:
        return refused(error.status, str(error), HEADERS.get(error.status))

    @api.exception_handler(StorageError)
    async def not_written(request: Request, error: StorageError) -> JSONResponse:
        return refused(409 if isinstance(error, CommitConflict) else 503, str(error))

    @api.exception_handler(HTTPException)
    async def of_the_interface(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's own, for what Python's reader of JSON refuses in other ways
            return refused(
                400,
                "the body cannot be read as JSON: it must be UTF-8, not nested too deeply, its numbers not too long",
            )
        return refused(
            error.status_code, f"{error.detail}: {request.method} {request.url.path}; /docs lists what there is",
            error.headers,
        )  # fmt: skip

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return refused(500, f"this should not happen ({type(error).__name__}); the replica's log says more")

    @api.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        content_type = request.headers.get("content-type", "")
        if not _is_json(content_type):
            found = f"found {content_type!r}" if content_type else "the request has none"
            return refused(
                422, f"the body is read as JSON only with the header content-type: application/json; {found}"
            )
        faults = error.errors()
        if any(fault["type"] == "json_invalid" for fault in faults):
            return refused(
                400, f"the body is no JSON: {faults[0]['ctx']['error']} (at character {faults[0]['loc'][-1]})"
            )
        said = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in faults[:_SHOWN]]
        said = [one.removeprefix("body: Value error, ") for one in said]  # `sound` says where
        return refused(422, "; ".join(said) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""))
