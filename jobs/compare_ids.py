"""`python -m jobs.compare_ids --recipe R --kinds tiger,cat_id2 --seeds 3 --json FILE`: ways of making IDs side by side."""

from catid2_ray.cli import compare_ids, run_alone

if __name__ == "__main__":
    run_alone(compare_ids)
