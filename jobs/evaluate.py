"""`python -m jobs.evaluate --recipe R`: measure recall of the candidate release."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("evaluate")
