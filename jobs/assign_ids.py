"""`python -m jobs.assign_ids --recipe R`: give every product its unique ID."""

from catid2_ray.on_ray.reindex import run_verb
from jobs.verb import main


def work(recipe):
    store, manifest = run_verb(recipe, "assign_ids")
    return store.uri_of(manifest.folder)


if __name__ == "__main__":
    main(work)
