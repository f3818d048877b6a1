"""`python -m jobs.train_quantizer --recipe R`: train the quantizer on committed embeddings."""

from catid2_ray.on_ray.reindex import run_verb
from jobs.verb import main


def work(recipe):
    store, manifest = run_verb(recipe, "train_quantizer")
    return store.uri_of(manifest.folder)


if __name__ == "__main__":
    main(work)
