"""`python -m tests.faults.one_job reindex --recipe …`: a command of `catid2` in a process of its own that starts no Ray, so that a
test may kill it at the cost of its work alone."""

import sys

from catid2_ray import cli
from tests.in_process import without_ray

if __name__ == "__main__":
    with without_ray():
        cli.guarded(lambda: cli.app(sys.argv[1:], standalone_mode=False))
