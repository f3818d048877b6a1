"""All kinds of IDs on one catalogue; writes the table, with the machine named, to benchmarks/results/compare_ids_NAME.md.

    python benchmarks/compare_ids.py --root DATA/bigbasket [--encoder FOLDER] [--store URI] [--render JSON …]

Three seeds of the kinds that the claims rest on, one of every other; about a minute a run on 2 cores. `--render` writes the
report from the JSON of earlier `catid2 compare-ids --json`. The last line printed is the JSON of all runs.
"""

import json
import tempfile
from pathlib import Path

from harness import RECIPES, RESULTS, finish, machine, parser_of

from catid2_ray.config import KINDS, Recipe
from catid2_ray.evaluation.ids_report import compare_table
from catid2_ray.evaluation.tables import markdown

RECIPE = RECIPES / "compare_ids.yaml"
CLAIMS = ("tiger", "cat_id2", "cat_id2_paper", "cat_id2_shuffled")
BUDGET = ("epochs", "batch", "learning_rate", "hidden", "latent", "codes_per_level")


def report(rows: list[dict], recipe: Recipe, name: str, encoder: str) -> str:
    values = {field: getattr(recipe.quantizer, field) for field in BUDGET}
    budget = ", ".join(f"{field} {value}" for field, value in values.items() if value is not None)
    return (
        f"# Ways of making IDs on {name}\n\n"
        f"Written by `benchmarks/compare_ids.py` with `jobs/recipes/compare_ids.yaml`: {budget}. Embedding: {encoder} of "
        f"{', '.join(recipe.embedding.text)}; categories are not in the text. Machine: {machine()}; two such comparisons ran "
        "at once beside other work, so seconds are upper bounds.\n\n"
        "Collisions (both definitions), codes used and perplexity are those of the codes before de-duplication; purity and AMI "
        "compare the first h tokens of the published IDs with the category at depth h, on true labels, `null` on permuted "
        "ones. All these products were in training, labels included. Mean over the seeds, ± half their range.\n\n"
        + markdown([compare_table(rows)])
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--root", help="folder with products.parquet")
    parser.add_argument("--encoder", default="lsa", help="sentence encoder: id or folder; default the built-in lsa")
    parser.add_argument("--store", help="default: a temporary folder")
    parser.add_argument("--render", nargs="*", type=Path, help="write the page from the figures of earlier comparisons")
    options = parser.parse_args()
    if not options.root:
        print(json.dumps({"skipped": "no catalogue: give --root FOLDER"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"catalog.root={options.root}", f"embedding.encoder={options.encoder}"]
        recipe = Recipe.load(RECIPE, [*settings, f"store={options.store or folder}"])
        if options.render:
            rows = [row for path in options.render for row in json.loads(path.read_text())]
        else:
            from catid2_ray.on_ray.reports import compare_ids

            rows = compare_ids(recipe, list(CLAIMS), 3).rows
            rows += compare_ids(recipe, [kind for kind in KINDS if kind not in CLAIMS], 1).rows
    name, encoder = Path(options.root).name, Path(options.encoder).name
    options.out = options.out or RESULTS / f"compare_ids_{name}.md"
    finish(rows, lambda rows: report(rows, recipe, name, encoder), options)


if __name__ == "__main__":
    main()
