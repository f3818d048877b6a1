"""`python -m catid2_ray.cli …` is `catid2 …`."""

from catid2_ray.cli import main

if __name__ == "__main__":
    main()
