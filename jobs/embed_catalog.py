"""`python -m jobs.embed_catalog --recipe R`: read and check the catalogue, and compute its embeddings."""

from catid2_ray.on_ray.reindex import run_verb
from jobs.verb import main


def work(recipe):
    store, manifest = run_verb(recipe, "embed_catalog")
    return store.uri_of(manifest.folder)


if __name__ == "__main__":
    main(work)
