"""What a store asks of S3 itself: pyarrow's client for reading, listings, deletions; no request leaves the prefix given.

s3fs does all of this too, but it reads tables at half the rate or less, asks for the bucket and for the folder above, which
limited credentials may not see, and takes `[`, `*` and `?` in a name for patterns. `fs` is its file system in all that follows.
"""

import contextlib
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from catid2_ray.artifacts import patience

_DELETED_AT_ONCE = 1000  # the most that one request of S3 takes


def arrow_client(fs, bucket: str) -> pafs.FileSystem | None:
    """pyarrow's S3 client for reading, with the endpoint and the region that s3fs found in the environment or in ~/.aws, and
    credentials from the same places; None where it cannot follow (an endpoint with a path).
    """
    found = fs.s3.meta
    endpoint = urlsplit(found.endpoint_url)
    options = {"scheme": endpoint.scheme, "region": found.region_name}
    if endpoint.hostname.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        # A bucket may lie in another region than the configured one; botocore follows there by itself, this client not.
        with contextlib.suppress(OSError):
            options["region"] = pafs.resolve_s3_region(bucket)
    elif endpoint.path.strip("/"):
        return None
    else:
        options["endpoint_override"] = endpoint.netloc
    return pafs.S3FileSystem(
        **options,
        connect_timeout=4,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=4),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
    )


def pages(fs, bucket: str, prefix: str, **options) -> Iterator[dict]:
    """The pages of a listing. s3fs's own `ls` and `exists` also ask for the parent or the bucket, which may be forbidden."""
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)
        yield page
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def delete_below(fs, path: str) -> None:
    """Delete every object below a folder (bucket/key). s3fs's own `rm` would read `[`, `*` and `?` in it as patterns."""
    bucket, _, key = path.partition("/")
    keys = [entry["Key"] for page in pages(fs, bucket, f"{key}/".lstrip("/")) for entry in page.get("Contents", ())]
    for start in range(0, len(keys), _DELETED_AT_ONCE):
        objects = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
        reply = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        for refused in reply.get("Errors", ()):
            kind = OSError if patience.passes(OSError(refused.get("Code"))) else PermissionError
            raise kind(f"{refused.get('Key')}: {refused.get('Code')}: {refused.get('Message')}")


class LiteralHandler(pafs.FSSpecHandler):
    """s3fs for pyarrow, without reading names as patterns where it deletes."""

    def delete_dir(self, path):
        delete_below(self.fs, path)

    def delete_file(self, path):
        self.fs.rm_file(path)

    def _delete_dir_contents(self, path, missing_dir_ok):
        delete_below(self.fs, path)
