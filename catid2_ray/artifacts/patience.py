"""Which failures of a store pass by themselves, which are its refusal, and how long to go on asking.

A budget in seconds for each request instead of a number of tries: an outage of half a minute is outlived whatever a try takes.
Waits are random between nothing and a bound that doubles ("full jitter": clients that failed together do not come back
together). A store that never answered is no store that fails but a wrong address: it gets FIRST_S.
"""

import errno
import random
import re
from collections.abc import Iterator

from catid2_ray.errors import StorageDenied, StorageError

PATIENCE_S, FIRST_S = 90.0, 3.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 8.0
_FULL = (
    "; the disk is full: free some (`catid2 gc`), or set `store`, CATID2_CACHE, or TMPDIR of Ray, whichever lies there, to a "
    "larger one, and run the same command to go on"
)

# Codes of S3, and what pyarrow's client makes of them in its messages.
_REFUSED = re.compile(
    r"AccessDenied|ACCESS_DENIED|Access Denied|ExpiredToken|TokenRefreshRequired|InvalidAccessKeyId|INVALID_ACCESS_KEY_ID"
    r"|SignatureDoesNotMatch|SIGNATURE_DOES_NOT_MATCH|InvalidToken|InvalidClientTokenId|INVALID_CLIENT_TOKEN_ID"
    r"|RequestTimeTooSkewed|REQUEST_TIME_TOO_SKEWED|AccountProblem|AllAccessDisabled|NoCredentialsError"
    r"|Unable to locate credentials|HTTP status 40[013]",
)
_PASSES = re.compile(
    r"SlowDown|SLOW_DOWN|reduce your request rate|InternalError|INTERNAL_FAILURE|ServiceUnavailable|SERVICE_UNAVAILABLE"
    r"|RequestTimeout\b|REQUEST_TIMEOUT|Throttl|THROTTLING|TooManyRequests|BandwidthLimitExceeded|OperationAborted|NETWORK_CONNECTION"
    r"|HTTP status (408|429|5\d\d)|Connection (reset|refused|aborted)|IncompleteRead"
)
_BY_NAME = re.compile(
    r"Timeout|Connection|HTTPClientError|IncompleteRead|ResponseStreaming|ClientPayload|ResponseParser|ServerDisconnected"
)


class GaveUp(OSError):
    """A request that was tried for its whole budget."""


def is_refusal(error: BaseException) -> bool:
    """Whether the store said no: another try would be refused as well, whatever the load."""
    return isinstance(error, PermissionError) or bool(_REFUSED.search(_said(error)))


def passes(error: BaseException) -> bool:
    """Whether the store was busy or away, so that another try may succeed."""
    if isinstance(error, GaveUp):
        return True
    status = answered(error)
    if is_refusal(error) or "SSLError" in type(error).__name__:
        return False
    if status in (408, 429) or status >= 500 or _PASSES.search(_said(error)):
        return True
    return any(_BY_NAME.search(kind.__name__) for kind in type(error).__mro__) and not status


def is_conflict(error: BaseException) -> bool:
    """Whether the object was there already that was to be written only if absent."""
    code = (
        getattr(error if hasattr(error, "response") else error.__cause__, "response", {})
        .get("Error", {})
        .get("Code", "")
    )
    told = ("PreconditionFailed", "pre-conditions")
    return (
        code in ("PreconditionFailed", "ConditionalRequestConflict", "412")
        or any(word in str(error) for word in told)
        or isinstance(error, FileExistsError)
    )


def answered(error: BaseException) -> int:
    """The status that the store replied with; 0 where it did not reply."""
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def waits(budget_s: float) -> Iterator[float]:
    """Seconds to wait before the second try, the third …; what is waited for adds up to about `budget_s`."""
    bound, left = _FIRST_WAIT_S, budget_s
    while left > 0:
        wait = min(random.uniform(0, bound), left)  # noqa: S311
        yield wait
        left, bound = left - max(wait, 0.01), min(2 * bound, _LONGEST_WAIT_S)


def failure(message: str, error: BaseException, *, answered: bool | None) -> StorageError:
    """The error of ours, which says what to do. `answered`: whether the store ever replied; None for one in a local folder."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of this machine, whatever the store is
        return StorageError(message + _FULL)
    if answered is None:
        return StorageError(message)
    if is_refusal(error):
        return StorageDenied(
            f"{message}; the store refuses what these credentials ask: check that they have not expired, that they may list, read, "
            "write and delete below this prefix, and this machine's clock; then run the same command to go on"
        )
    if passes(error) and answered:
        return StorageError(
            f"{message}; it answered before, so it is busy or away: run the same command later to go on"
        )
    return StorageError(
        f"{message}; check AWS_ENDPOINT_URL, the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and that the bucket exists"
    )
