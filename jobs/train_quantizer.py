"""`python -m jobs.train_quantizer --recipe R`: train the quantizer on committed embeddings."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("train_quantizer")
