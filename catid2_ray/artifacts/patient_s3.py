"""s3fs with one loop of retries instead of its own and botocore's: by a budget in seconds, with jitter, and never of a refusal."""

import asyncio
import time

import s3fs
from fsspec.asyn import sync_wrapper
from s3fs.errors import translate_boto_error

from catid2_ray.artifacts import patience

REACHED: set[tuple | None] = {None}  # endpoint and bucket of the stores that answered this process


class PatientS3(s3fs.S3FileSystem):
    """`patience_s`: how long a request is tried; `where`: endpoint and bucket, None for one that was pickled by others, as for
    Ray Train's workers: it was reached before."""

    retries = 8  # of a body that ends too soon; waits 0.1 s, then 1.7 times as long each time
    patience_s, where = patience.PATIENCE_S, None

    @property
    def answered(self) -> bool:
        """Whether the store ever replied to this process, whatever it said."""
        return self.where in REACHED

    @answered.setter
    def answered(self, reached: bool) -> None:
        if reached:
            REACHED.add(self.where)

    async def _call_s3(self, method, *more, **given):
        await self.set_session()
        client = await self.get_s3(given.get("Bucket"))
        call = getattr(client, method)
        arguments = self._get_s3_method_kwargs(call, *more, **given)
        started, waits = time.monotonic(), patience.waits(float("inf"))
        while True:
            try:
                reply = await call(**arguments)
                self.answered = True
                return reply
            except Exception as error:
                self.answered = bool(patience.answered(error))
                budget_s = self.patience_s if self.answered else min(patience.FIRST_S, self.patience_s)
                if not patience.passes(error):
                    raise translate_boto_error(error) from error
                if time.monotonic() - started + (wait_s := next(waits)) > budget_s:
                    # s3fs's own loops, which read bodies, do not try this one again.
                    tried_s = time.monotonic() - started
                    raise patience.GaveUp(f"{type(error).__name__}: {error} (tried for {tried_s:.0f} s)") from error
                await asyncio.sleep(wait_s)

    call_s3 = sync_wrapper(_call_s3)
