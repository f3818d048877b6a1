"""What a replica writes to its log: an event a line, as JSON or as key=value, with the id of the request that it belongs to.

A request is logged that changes products or is refused; Ray's own access log has them all, under the same ids. What was asked
for is in no line.
"""

import ast
import sys
import time
import uuid
from typing import Any

import structlog
from starlette.datastructures import Headers

from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.serve.keys import right_of
from catid2_ray.redaction import redacted

REQUEST_ID = "x-request-id"  # Ray's proxy sets it where the caller did not, and gives it back
_LONGEST = 64  # characters of a request id, and of a path, that are kept


def write_json() -> None:
    """From now on every event of this process, also those of its threads, is one line of JSON on standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(default=str),
            lambda logger, method, line: redacted(line),
        ],
        logger_factory=lambda *_: _Lines(),
    )
    progress.write_by(lambda name, values: structlog.get_logger().info(name, **_plain(values)))


class _Lines:
    """Where structlog writes."""

    def info(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    error = info


def event(name: str, *, error: bool = False, **values: Any) -> None:
    """One line, with what is known of the request at hand."""
    if progress.is_written_elsewhere():
        (structlog.get_logger().error if error else structlog.get_logger().info)(name, **values)
    else:
        progress.event(name, **structlog.contextvars.get_contextvars(), **values)


def of_request(headers) -> structlog.contextvars.bound_contextvars:
    """Lines of this block name the request; one without an id gets one."""
    request_id = headers.get(REQUEST_ID) or headers.get("request_id") or uuid.uuid4().hex
    return structlog.contextvars.bound_contextvars(request_id=_safe(request_id))


def _safe(text: str) -> str:
    """A caller chooses it: no blanks, quotes or control characters, which would look like other values."""
    kept = "".join(char for char in text[:_LONGEST] if char.isascii() and (char.isalnum() or char in "-_.:/"))
    return kept or "unusable"


def _plain(values: dict) -> dict:
    """Texts that were quoted for key=value lines, without their quotes."""
    return {name: _unquoted(value) if isinstance(value, str) else value for name, value in values.items()}


def _unquoted(text: str) -> str:
    if text[:1] not in ("'", '"'):
        return text
    try:
        return str(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


class Logged:
    """ASGI middleware: gives each request its id, and logs those that change products or are refused."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500  # what an exception that passes here becomes

        async def sent(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with of_request(Headers(scope=scope)):
            try:
                await self.app(scope, receive, sent)
            finally:
                # What is refused before its route is known has its path.
                route = getattr(scope.get("route"), "path", None) or _safe(scope["path"])
                if status >= 400 or right_of(scope["method"], route) == "write":
                    call = f"{scope['method']} {route}".replace(" ", "_")
                    took_ms = round(1e3 * (time.perf_counter() - began), 1)
                    event("request", error=status >= 500, call=call, status=status, ms=took_ms)
