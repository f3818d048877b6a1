"""Settings that follow the catalogue's size where a recipe leaves them out, or says `auto`.

They are marked `sized` in their sections, and the arithmetic is that of `catid2 init` (`suggest`): the same counts give the same
numbers. A current release's own numbers come first. So growth by a hundredth changes no number and renames no product.
"""

from collections.abc import Mapping
from typing import NamedTuple

from catid2_ray.config.recipe import Recipe
from catid2_ray.config.section import TrainingRecipe
from catid2_ray.config.suggest import codes_per_level, generator_batch, generator_epochs, quantizer_batch

MOVED = 2.0  # times as many products, or as few, from which a release's batches and epochs are not kept
FAR = (
    4.0  # times too large or too small, from which they are not kept either: so growth in small steps is followed, too
)


class Before(NamedTuple):
    """What the current release was made with. `sections`: the stored values of quantizer and generator."""

    name: str
    products: int
    sections: Mapping[str, Mapping]


class Sized(NamedTuple):
    """`recipe` says all numbers. `chosen`: those that it left out, by path. `kept`: by path, the number that the size asks for,
    where the release's own was kept though it is more than `MOVED` times as large or as small."""

    recipe: Recipe
    chosen: dict[str, object]
    kept: dict[str, object]


def examples_an_epoch(mix: Mapping[str, float], *, teaching: int, products: int) -> int:
    """Examples that the generator sees in an epoch of a mix, which counts in training pairs that teach, or in titles where there
    are none (`generator.batches.mix_ratios`)."""
    mix = mix if teaching else {kind: mix.get(kind, 0) for kind in ("title", "span", "synthetic")}
    mix = mix if any(mix.values()) else {"title": 1.0}
    return sum(round(ratio * (teaching or products)) for ratio in mix.values())


def left_out(recipe: Recipe) -> list[tuple[str, str]]:
    """Section and name of each sized setting that the recipe leaves out and needs: stages have epochs of their own."""
    parts = (("quantizer", recipe.quantizer), ("generator", recipe.generator))
    return [
        (section, name)
        for section, part in parts
        for name in part.sized()
        if name not in part.model_fields_set and not (name == "epochs" and part.stages)
    ]


def sized(recipe: Recipe, *, products: int, teaching: int, before: Before | None = None) -> Sized:
    """The recipe with a number for each sized setting that it leaves out. `teaching`: pairs that the generator learns from.

    Where there is a release `before`, its codes per level are kept, for its ledger holds IDs of one form; so are its batches and
    epochs, unless the catalogue has become more than `MOVED` times as large or as small, or they fit it `FAR` too badly. Raises
    RecipeError where a number does not go with what the recipe states.
    """
    fitting = _fitting(recipe, products=products, teaching=teaching)
    values, chosen, kept = recipe.model_dump(mode="json", exclude_unset=True), {}, {}
    near = before is not None and 1 / MOVED <= products / max(1, before.products) <= MOVED
    for section, name in left_out(recipe):
        path, number = f"{section}.{name}", fitting[section, name]
        had = before.sections[section][name] if before else None
        if had not in (None, "auto"):  # a release trained in stages has no epochs of its own
            times_off = max(_size(had) / _size(number), _size(number) / _size(had))
            if name == "codes_per_level" or (near and times_off <= FAR):
                if times_off > MOVED:
                    kept[path] = number
                number = had
        if name == "batch":
            number = _whole(number, getattr(recipe, section))
        chosen[path] = values.setdefault(section, {})[name] = number
    return Sized(Recipe.build(values) if chosen else recipe, chosen, kept)


def _fitting(recipe: Recipe, *, products: int, teaching: int) -> dict[tuple[str, str], object]:
    generator = recipe.generator
    examples = examples_an_epoch(generator.plan[0].mix, teaching=teaching, products=products)
    return {
        ("quantizer", "codes_per_level"): [codes_per_level(products)] * len(recipe.quantizer.codes_per_level),
        ("quantizer", "batch"): quantizer_batch(products),
        ("generator", "batch"): generator_batch(examples),
        ("generator", "epochs"): generator_epochs(examples),
    }


def _size(number) -> float:
    return max(number) if isinstance(number, list | tuple) else number


def _whole(batch: int, section: TrainingRecipe) -> int:
    """The nearest batch not above that splits evenly over the workers."""
    rows = section.workers * (section.micro_batch or 1)
    return max(rows, batch // rows * rows)
