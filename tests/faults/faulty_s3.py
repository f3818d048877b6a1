"""A proxy before the S3 server of the tests that puts faults in: errors, cut connections, a blackout, slow replies, refusals.

Whether a request meets a fault is a hash of (seed, method, path, how often it was asked before): the same whatever the order
in which threads ask.
"""

import contextlib
import hashlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied", 400: "ExpiredToken"}


class FaultyS3:
    """`errors`, `cuts`: shares of requests; `away_until`: no reply before that time.monotonic(); `refuses`: 403 AccessDenied or
    400 ExpiredToken to each; `slow_s`: what each reply takes longer, its second half late; `injected`: fault → how often.
    `hook`: called with the number of each request before it is served."""

    def __init__(self, upstream: str, *, seed: int):
        self.upstream, self.seed = urlsplit(upstream), seed
        self.errors = self.cuts = self.slow_s = self.away_until = 0.0
        self.refuses, self.hook = 0, lambda number: None
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def share(self, method: str, path: str) -> float:
        """Uniform in [0, 1), new each time that the same is asked."""
        with self._lock:
            self._asked[method, path] += 1
            self.requests += 1
            asked, number = self._asked[method, path], self.requests
        self.hook(number)
        text = f"{self.seed} {method} {path} {asked}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

    def count(self, fault: str) -> None:
        with self._lock:
            self.injected[fault] += 1


@contextlib.contextmanager
def faulty(environment: dict[str, str], *, seed: int) -> Iterator[tuple[FaultyS3, dict[str, str]]]:
    """The proxy and the environment that leads clients through it."""
    proxy = FaultyS3(environment["AWS_ENDPOINT_URL"], seed=seed)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy, environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version, proxy = "HTTP/1.1", None

    def log_message(self, *_):
        pass

    def serve(self):
        proxy, length = self.proxy, int(self.headers.get("Content-Length", 0))
        share = proxy.share(self.command, self.path)
        if time.monotonic() < proxy.away_until:
            proxy.count("away")
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if proxy.refuses:
            proxy.count(_CODES[proxy.refuses])
            return self.reply(proxy.refuses, {"Content-Type": "application/xml"}, _error(proxy.refuses))
        if share < proxy.errors:
            code = 503 if share < proxy.errors / 2 else 500
            proxy.count(f"{code} {_CODES[code]}")
            return self.reply(code, {"Content-Type": "application/xml"}, _error(code))
        cut = share < proxy.errors + proxy.cuts
        if cut and self.command in ("PUT", "POST") and share < proxy.errors + proxy.cuts / 2:
            proxy.count("cut before it was done")
            self.close_connection = True
            return
        status, headers, data = self.forward(body)
        if cut and (self.command in ("PUT", "POST", "DELETE") or not data):
            proxy.count("reply lost")
            self.close_connection = True
            return
        if cut:
            proxy.count("cut in the body")
        if proxy.slow_s:
            proxy.count("slow reply")
            time.sleep(proxy.slow_s / 2)
        self.reply(status, headers, data, cut=cut)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream.hostname, self.proxy.upstream.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        connection.request(self.command, self.path, body=body or None, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date", "server")
        }
        connection.close()
        return answer.status, kept, data

    def reply(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(name, value)
        named = {name.lower(): value for name, value in headers.items()}
        size = named.get("content-length", "0") if self.command == "HEAD" and status < 400 else len(data)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if cut:
            self.close_connection = True
            return
        if self.proxy.slow_s:
            time.sleep(self.proxy.slow_s / 2)
        self.wfile.write(data[half:])


def _error(status: int) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{_CODES[status]}</Code><Message>put in</Message></Error>".encode()
