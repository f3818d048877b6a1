"""The Home Depot recipe from start to end; writes its closing table, with the machine named, to benchmarks/results/.

    python benchmarks/home_depot.py --root DATA/home_depot [--encoder FOLDER] [--store URI] [--render JSON]

Data and encoder are not part of the project: without --root this says so and ends. `--render` writes the report from the
JSON of an earlier run instead of running. The last line printed is the run's JSON.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from surroundings import machine

from catid2_ray.config import Recipe
from catid2_ray.evaluation.report import markdown

HERE = Path(__file__).parent
RECIPE = HERE.parent / "jobs" / "recipes" / "home_depot.yaml"


def report(figures: dict, recipe: Recipe, encoder: str, notes: str) -> str:
    return (
        "# Home Depot, the whole job\n\n"
        f"Written by `benchmarks/home_depot.py` for `jobs/recipes/home_depot.yaml`; encoder: {encoder}. "
        f"Machine: {machine()}.\n\n"
        f"{markdown(figures)}\n"
        "Categories of this catalogue are **inferred** from titles. *Seen* products are those that a training pair names. "
        f"Relevant: relevance ≥ {recipe.evaluation.min_relevance}; taught: ≥ {recipe.generator.min_relevance}; "
        f"beam {recipe.evaluation.beam_width}. Stage times are those of the run that made each stage.\n\n{notes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", default=os.environ.get("HOME_DEPOT"), help="folder with products.parquet and pairs.parquet"
    )
    parser.add_argument("--encoder", default="lsa", help="sentence encoder: id or folder; default the built-in lsa")
    parser.add_argument("--store", help="default: a temporary folder")
    parser.add_argument("--render", help="JSON of an earlier `catid2 reindex --json`")
    options = parser.parse_args()
    if not (options.root or options.render):
        print(json.dumps({"skipped": "no Home Depot data: give --root FOLDER or set HOME_DEPOT"}))
        return
    overrides = [f"catalog.root={options.root or 'unused'}", f"embedding.encoder={options.encoder}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(RECIPE, [*overrides, f"store={options.store or folder}"])
        if options.render:
            figures = json.loads(Path(options.render).read_text())
        else:
            from catid2_ray.on_ray.commands import reindex

            figures = reindex(recipe).figures
    target = HERE / "results" / "home_depot.md"
    notes = target.with_name("home_depot_notes.md")
    target.write_text(report(figures, recipe, Path(options.encoder).name, notes.read_text() if notes.exists() else ""))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
