"""A throw-away S3 server on localhost: `with s3_server() as environment:` yields the variables that point clients at it.

The server is moto in a process of its own (this file, run as a program). Requests are served one at a time, because
moto's check of `If-None-Match` and its write are two steps: served in parallel, two creators of one name could both win.
The process ends with the `with` block, and by itself when the test process dies, since it then loses its standard input.

moto knows no policies. Here the access key `limited-to-PREFIX` stands for credentials with one: whatever lies outside
PREFIX, the bucket itself included, is refused with 403, and so is HEAD of an absent object, as on AWS.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Iterator

SECRET = "a-secret-that-must-not-be-written-anywhere"
LIMITED = "limited-to-"


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start a server on a free port; yields the environment variables a client needs. os.environ is left alone.

    With CATID2_TEST_S3=1 the server that the AWS_… variables of the environment point at is used instead, a Ceph gateway
    say: the most real of all, and not started here.
    """
    if os.environ.get("CATID2_TEST_S3"):
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the S3 server did not start: {process.stderr.read()[-2000:]}")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
    finally:
        process.kill()
        process.communicate()


def client(environment: dict[str, str]):
    """A boto3 client, for what the code under test must not do itself: create buckets and look behind its back."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def new_bucket(environment: dict[str, str]) -> str:
    """Create a bucket with a name of its own; returns `s3://bucket`."""
    name = f"bucket-{uuid.uuid4().hex[:10]}"
    client(environment).create_bucket(Bucket=name)
    return f"s3://{name}"


def _allowed(environ: dict, prefix: str) -> bool:
    """Whether every key that a request names lies below the prefix; a listing names its prefix."""
    _, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
    query = urllib.parse.parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    if key:
        return key.startswith(prefix)
    if environ["REQUEST_METHOD"] == "POST" and "delete" in query:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        environ["wsgi.input"] = io.BytesIO(body)
        return all(key.startswith(prefix) for key in re.findall("<Key>(.*?)</Key>", body.decode()))
    return environ["REQUEST_METHOD"] == "GET" and "list-type" in query and query["prefix"][0].startswith(prefix)


def _refuse(start_response) -> list[bytes]:
    start_response("403 Forbidden", [("Content-Type", "application/xml")])
    return [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]


def _serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    dispatch, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ, start_response):
        limit = re.search(f"Credential={LIMITED}([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if limit and not _allowed(environ, f"{limit.group(1)}/"):
            return _refuse(start_response)
        with one_at_a_time:
            if not limit or environ["REQUEST_METHOD"] != "HEAD":
                return dispatch(environ, start_response)
            reply = []
            body = dispatch(environ, lambda *started: reply.append(started))
        if reply[0][0].startswith("404"):
            return _refuse(start_response)
        start_response(*reply[0])
        return body

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
