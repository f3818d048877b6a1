"""`python -m jobs.reproduce --recipe R --tables 2,5 --seeds 3`: the paper's tables and figures on a recipe's catalogue."""

from catid2_ray.cli import run_alone
from catid2_ray.cli.reproduce import reproduce

if __name__ == "__main__":
    run_alone(reproduce)
