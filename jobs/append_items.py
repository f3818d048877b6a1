"""`python -m jobs.append_items --recipe R [--json FILE]`: new products get IDs, none that is published moves; publish."""

from catid2_ray.cli import run_append

if __name__ == "__main__":
    run_append()
