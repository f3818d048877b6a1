"""Takes secrets out of text that is shown, logged or sent: values of the environment, passwords and signatures in URLs.

Libraries quote what they were given, such as an endpoint with its password. A value of fewer than 8 characters stays: it would be
taken out of innocent words.
"""

import os
import re

HIDDEN = "[hidden]"
# The lines of CATID2_KEYS are `read KEY` or `write KEY`; of the others the whole value is secret.
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "CATID2_KEYS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip
_SHORTEST = 8
_PASSWORD = re.compile(r"(?<=://)[^/\s@'\"]*:[^/\s@'\"]*(?=@)")
_SIGNATURE = re.compile(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s'\"]+")


def redacted(text: str) -> str:
    """The text with each secret of this process's environment, and each secret part of a URL, as `[hidden]`."""
    for name in VARIABLES:
        for line in os.environ.get(name, "").splitlines():
            secret = line.strip().rpartition(" ")[2]
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, HIDDEN)
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _PASSWORD.sub(HIDDEN, text))
