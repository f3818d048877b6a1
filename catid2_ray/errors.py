"""Every error that this project raises on purpose, and the exit code a job ends with.

Each message says what was wrong, where (URI, column, product_id), what was expected and found, and what to do next.

    CatidError                        1
    ├── RecipeError(ValueError)       2   the recipe contradicts itself, or does not fit the data
    ├── InputError(ValueError)        3   a table, a row or a column is not what the schema says
    │   ├── CapacityError             3   more products than there are IDs, or fewer than there are codes
    │   └── QueryError                3   a query that cannot be answered
    ├── EncoderError                  4   the text encoder or the pretrained model cannot be had
    ├── StorageError                  5   the store cannot be reached, read or written
    │   ├── StorageDenied             5   the store refuses what these credentials ask
    │   ├── ArtifactError             5   an artefact is missing, half-written or not what its manifest says
    │   │   ├── FormatError           5   an artefact was written by another version of this software
    │   │   └── ReleaseError          5   the parts of a release do not belong together
    │   ├── CommitConflict            5   another writer committed first; nothing was lost
    │   └── LeaseError                9   another job works on the same store, or took this one's lease
    ├── TrainingError                 6   a training run ended without a result
    │   ├── WorkerDied                6   what a worker met is no error of ours: it was killed, say
    │   └── CollapseError             8   the codes collapsed and stayed so
    ├── MachineError                 11   a machine has too little disk, memory or room for Ray's objects
    ├── QualityGateError              7   the job finished, but its figures are below what the recipe demands
    │   └── ChurnGateError           10   more products would get another ID than the recipe allows
    └── Interrupted                 130   a person pressed Ctrl-C; 143 where the job got SIGTERM

`transient` errors may pass by themselves: a training whose workers met one is tried again, up to the recipe's max_failures.
All others are the same on a rerun and end the job at once. A message that quotes a secret of the environment hides it.
"""

from catid2_ray.redaction import redacted


class CatidError(Exception):
    """Root of the tree; `exit_code` is what a command line ends with."""

    exit_code = 1
    transient = False

    def __init__(self, *arguments):
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in arguments))


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
    transient = True


class StorageDenied(StorageError):
    transient = False


class ArtifactError(StorageError):
    transient = False


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


class WorkerDied(TrainingError):
    transient = True


class CollapseError(TrainingError):
    exit_code = 8


class MachineError(CatidError):
    exit_code = 11


class QualityGateError(CatidError):
    exit_code = 7


class ChurnGateError(QualityGateError):
    exit_code = 10


class Interrupted(CatidError):
    """`signal`: the number of the one received; the exit code is what shells give a process that died of it."""

    def __init__(self, message: str, *, signal: int = 2):
        super().__init__(message)
        self.exit_code = 128 + signal
