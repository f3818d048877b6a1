"""The one name in a recipe that becomes code: `alignment.ranker`, imported where whoever runs the job permitted it.

A recipe may come from others than the operator, and importing a module runs it. So CATID2_RANKERS, in the environment that the
job starts in, lists the functions that may be named; its workers get the same list.
"""

import importlib
import os
import sys
from collections.abc import Callable

from catid2_ray.errors import RecipeError

VARIABLE = "CATID2_RANKERS"


def permitted() -> list[str]:
    """The functions that the environment permits, as `module:function`."""
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def open_ranker(name: str | None) -> Callable | None:
    """The function that `module:function` names, or None. RecipeError where it is not permitted, cannot be imported, or is no
    function; what is not permitted is not imported."""
    if name is None:
        return None
    if name not in permitted():
        raise RecipeError(
            f"alignment.ranker {name!r} is a function that this job would import and run, and {VARIABLE} does not permit it "
            f"({', '.join(permitted()) or 'it is empty'}). If you trust it, set {VARIABLE}={name} where the job starts; several "
            "names are separated by commas"
        )
    module, _, function = name.partition(":")
    try:
        ranker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"alignment.ranker {name!r} cannot be imported ({type(error).__name__}: {error}); its module must be on the path "
            f"of every worker, such as PYTHONPATH, {sys.path[:3]} …"
        ) from None
    if not callable(ranker):
        raise RecipeError(f"alignment.ranker {name!r} is a {type(ranker).__name__}, expected a function")
    return ranker
