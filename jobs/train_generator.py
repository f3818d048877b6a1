"""`python -m jobs.train_generator --recipe R`: make the training examples and train the generator."""

from jobs.verb import main_stage

if __name__ == "__main__":
    main_stage("train_generator")
