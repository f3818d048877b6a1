"""Every error that this project raises on purpose, and the exit code a job ends with.

Each message says what was wrong, where (URI, column, product_id), what was expected and found, and what to do next.

    CatidError                        1
    ├── RecipeError(ValueError)       2   the recipe contradicts itself, or does not fit the data
    ├── InputError(ValueError)        3   a table, a row or a column is not what the schema says
    │   ├── CapacityError             3   more products than there are IDs, or fewer than there are codes
    │   └── QueryError                3   a query that cannot be answered
    ├── EncoderError                  4   the text encoder or the pretrained model cannot be had
    ├── StorageError                  5   the store cannot be reached, read or written
    │   ├── ArtifactError             5   an artefact is missing, half-written or not what its manifest says
    │   │   ├── FormatError           5   an artefact was written by another version of this software
    │   │   └── ReleaseError          5   the parts of a release do not belong together
    │   ├── CommitConflict            5   another writer committed first; nothing was lost
    │   └── LeaseError                9   another job works on the same store, or took this one's lease
    ├── TrainingError                 6   a training run ended without a result
    │   └── CollapseError             8   the codes collapsed and stayed so
    └── QualityGateError              7   the job finished, but its figures are below what the recipe demands
"""


class CatidError(Exception):
    """Root of the tree; `exit_code` is what a command line ends with."""

    exit_code = 1


class RecipeError(CatidError, ValueError):
    exit_code = 2


class InputError(CatidError, ValueError):
    exit_code = 3


class CapacityError(InputError):
    pass


class QueryError(InputError):
    pass


class EncoderError(CatidError):
    exit_code = 4


class StorageError(CatidError):
    exit_code = 5


class ArtifactError(StorageError):
    pass


class FormatError(ArtifactError):
    pass


class ReleaseError(ArtifactError):
    pass


class CommitConflict(StorageError):
    pass


class LeaseError(StorageError):
    exit_code = 9


class TrainingError(CatidError):
    exit_code = 6


class CollapseError(TrainingError):
    exit_code = 8


class QualityGateError(CatidError):
    exit_code = 7
