"""`python -m jobs.evaluate --recipe R`: measure recall of the candidate release."""

from catid2_ray.on_ray.reindex import run_verb
from jobs.verb import main


def work(recipe):
    store, manifest = run_verb(recipe, "evaluate")
    return store.uri_of(manifest.folder)


if __name__ == "__main__":
    main(work)
