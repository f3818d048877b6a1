"""`python -m jobs.train_generator --recipe R`: make the training examples and train the generator."""

from catid2_ray.on_ray.reindex import run_verb
from jobs.verb import main


def work(recipe):
    store, manifest = run_verb(recipe, "train_generator")
    return store.uri_of(manifest.folder)


if __name__ == "__main__":
    main(work)
