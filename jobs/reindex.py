"""`python -m jobs.reindex --recipe R [--json FILE]`: the whole chain, from the first stage without a committed manifest."""

from catid2_ray.cli import reindex, run_alone

if __name__ == "__main__":
    run_alone(reindex)
