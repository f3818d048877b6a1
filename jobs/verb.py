"""What every job shares: `--recipe`, `--set`, errors as one message and an exit code."""

from collections.abc import Callable

import typer

from catid2_ray.cli import RecipeOption, SetOption, guarded
from catid2_ray.config import Recipe


def main(work: Callable[[Recipe], str]) -> None:
    """Parse the recipe, call `work`, print what it returns (a URI); a CatidError ends with its message and exit code."""

    def command(recipe: RecipeOption, overrides: SetOption = None) -> None:
        print(work(Recipe.load(recipe, overrides or [])))

    guarded(lambda: typer.run(command))
