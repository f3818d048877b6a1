"""The Home Depot recipe from start to end; writes its closing table, with the machine named, to benchmarks/results/.

    python benchmarks/home_depot.py --root DATA/home_depot [--encoder FOLDER] [--store URI] [--seed 0] [--render JSON]

Data and encoder are not part of the project: without --root this says so and ends. `--render` writes the report from the
JSON of an earlier run instead of running. The last line printed is the run's JSON.
"""

import json
import os
import tempfile
from pathlib import Path

from harness import RECIPES, RESULTS, finish, machine, parser_of

from catid2_ray.config import Recipe
from catid2_ray.evaluation.report import closing_tables
from catid2_ray.evaluation.tables import markdown

RECIPE = RECIPES / "home_depot.yaml"


def report(figures: dict, recipe: Recipe, encoder: str) -> str:
    return (
        "# Home Depot, the whole job\n\n"
        f"Written by `benchmarks/home_depot.py` for `jobs/recipes/home_depot.yaml`; encoder: {encoder}. "
        f"Machine: {machine()}.\n\n"
        f"{markdown(closing_tables(figures))}\n"
        "Categories of this catalogue are **inferred** from titles. *Seen* products are those that a training pair names. "
        f"Relevant: relevance ≥ {recipe.evaluation.min_relevance}; taught: ≥ {recipe.generator.min_relevance}; "
        f"beam {recipe.evaluation.beam_width}. Stage times are those of the run that made each stage."
    )


def main() -> None:
    parser = parser_of(
        __doc__, page=RESULTS / "home_depot.md", stored="the figures of an earlier `catid2 reindex --json`"
    )
    parser.add_argument(
        "--root", default=os.environ.get("HOME_DEPOT"), help="folder with products.parquet and pairs.parquet"
    )
    parser.add_argument("--encoder", help="folder of the sentence encoder, where the machine reaches no model hub")
    parser.add_argument("--store", help="default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0, help="of the recipe: adapter, quantizer, generator")
    options = parser.parse_args()
    if not (options.root or options.render):
        print(json.dumps({"skipped": "no Home Depot data: give --root FOLDER or set HOME_DEPOT"}))
        return
    overrides = [f"catalog.root={options.root or 'unused'}", f"seed={options.seed}"]
    if options.encoder:
        overrides += [f"embedding.encoder={options.encoder}", f"generator.encoder={options.encoder}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(RECIPE, [*overrides, f"store={options.store or folder}"])
        if options.render:
            figures = json.loads(options.render.read_text())
        else:
            from catid2_ray.on_ray.commands import reindex

            figures = reindex(recipe).figures
    finish(figures, lambda figures: report(figures, recipe, Path(recipe.embedding.encoder).name), options)


if __name__ == "__main__":
    main()
