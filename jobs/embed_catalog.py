"""`python -m jobs.embed_catalog --recipe R`: read and check the catalogue, and compute its embeddings."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("embed_catalog")
