"""`python -m jobs.align_generator --recipe R`: align the trained generator, which must be there, with what searchers do."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("align_generator")
