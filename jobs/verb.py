"""What every job shares: `--recipe`, `--set`, errors as one message and an exit code, the manifest's URI at the end."""

from collections.abc import Callable

from catid2_ray.cli import RecipeOption, SetOption, run_alone
from catid2_ray.config import Recipe


def main(work: Callable[[Recipe], str]) -> None:
    """Parse the recipe, call `work`, print what it returns (a URI); a CatidError ends with its message and exit code."""

    def command(recipe: RecipeOption, overrides: SetOption = None) -> None:
        print(work(Recipe.load(recipe, overrides or [])))

    run_alone(command)


def main_stage(verb: str) -> None:
    """`main` for a verb that runs stages: prints the URI of the last stage's manifest."""
    from catid2_ray.on_ray.commands import run_verb

    def work(recipe: Recipe) -> str:
        store, manifest = run_verb(recipe, verb)
        return store.uri_of(manifest.name)

    main(work)
