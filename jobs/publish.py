"""`python -m jobs.publish --recipe R`: make the committed parts of this recipe the current release."""

from catid2_ray.on_ray.commands import publish
from jobs.verb import main


def work(recipe, *, wait):
    store, release = publish(recipe, wait=wait)
    return store.uri_of(f"releases/{release.name}.json")


if __name__ == "__main__":
    main(work)
