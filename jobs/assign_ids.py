"""`python -m jobs.assign_ids --recipe R`: give every product its unique ID."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("assign_ids")
