"""Who may read and who may change products: keys that a caller sends as `Authorization: Bearer KEY`.

Keys come from a file or the environment, never from a recipe or a store, and are compared in constant time. Without any key
everybody may read, and changes are as the setting `updates` says.
"""

import hmac
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette._utils import get_route_path  # the path that Starlette routes by, without the application's prefix
from starlette.datastructures import Headers

from catid2_ray.errors import InputError
from catid2_ray.on_ray.serve.refusals import HEADERS, Unserved, refused

VARIABLE = "CATID2_KEYS"
RIGHTS = ("read", "write")
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
_SHORTEST = 16  # characters of a key


class Keys:
    """`lines`: `read KEY` or `write KEY` each; a key that may write may read. Raises InputError, which names no key."""

    def __init__(self, lines: str = "", *, where: str = VARIABLE):
        self._keys: list[tuple[bytes, str]] = []
        for number, line in enumerate(lines.splitlines(), 1):
            right, _, key = line.strip().partition(" ")
            if not right or right.startswith("#"):
                continue
            if right not in RIGHTS or len(key.strip()) < _SHORTEST or not key.strip().isascii():
                raise InputError(
                    f"line {number} of {where} is no key: expected `read KEY` or `write KEY`, KEY of at least {_SHORTEST} ASCII "
                    "characters"
                )
            self._keys.append((key.strip().encode(), right))

    @classmethod
    def of(cls, file: str | None, *, needed: bool = False) -> "Keys":
        """Those of the file, else of the environment. Raises InputError where there are none and they are `needed`, as for a
        service that was deployed with keys: nobody may be let in because a node lacks them."""
        try:
            keys = cls(os.environ.get(VARIABLE, "")) if file is None else cls(Path(file).read_text("utf-8"), where=file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of keys {file} cannot be read ({type(error).__name__})") from None
        if needed and not keys:
            raise InputError(
                f"this service has keys, and there are none on this node: {VARIABLE} must be set there, or `keys` name a file that "
                "every node has"
            )
        return keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def any_writes(self) -> bool:
        return any(right == "write" for _, right in self._keys)

    def check(self, headers: Mapping[str, str], right: str) -> None:
        """Raise Unserved (401, 403) unless the request has a key with this right. Without any key there is nothing to check."""
        if not self._keys:
            return
        kind, _, sent = headers.get("authorization", "").partition(" ")
        given = sent.strip().encode("utf-8", "replace") if kind.lower() == "bearer" else b""
        # All are compared, so that the time tells nothing.
        rights = {has for key, has in self._keys if hmac.compare_digest(key, given)}
        if not rights:
            raise Unserved(401, "send a key of this service: Authorization: Bearer KEY")
        if right == "write" and "write" not in rights:
            raise Unserved(403, "this key may read, not change products")


def right_of(method: str, path: str) -> str | None:
    """What a call needs; None for those that need no key. What is not known to read needs the right to write."""
    if path in OPEN:
        return None
    return "read" if method in ("GET", "HEAD") or path == "/v1/retrieve" else "write"


class Locked:
    """ASGI middleware: a request without the right key is refused before its body is read. `keys`: gives those of the replica."""

    def __init__(self, app, keys: Callable[[], Keys]):
        self.app, self.keys = app, keys

    async def __call__(self, scope, receive, send):
        right = right_of(scope["method"], get_route_path(scope)) if scope["type"] == "http" else None
        if right is not None:
            try:
                self.keys().check(Headers(scope=scope), right)
            except Unserved as error:
                return await refused(error.status, str(error), HEADERS.get(error.status))(scope, receive, send)
        await self.app(scope, receive, send)
