"""`python -m jobs.append_items --recipe R [--json FILE]`: new products get IDs, none that is published moves; publish."""

from catid2_ray.cli import append, run_alone

if __name__ == "__main__":
    run_alone(append)
