"""Known-item search on a table without queries: products and pairs for `catid2 reproduce`, made of the products' descriptions.

    python benchmarks/known_item.py DATA_FOLDER OUT_FOLDER

A query is a seeded sentence of a product's description without its title's words, and that product is the one to find; category
names are never read, for queries made of them would be circular. Products without such a sentence, and further products of one
title, are left out. Sentences of 70 % of the products teach, as in `benchmarks/ids.py`, which shares this code; those of 10 % are
validation and of 20 % test. Written to OUT_FOLDER:

- products.parquet: DATA_FOLDER's, without descriptions: BM25 reads them, and each query would stand in one, word by word. As a
  query has no word of its own title either, BM25 finds next to nothing by design, and what it finds says nothing about BM25.
- pairs.parquet: relevance 3 of what is to be found. A text that products share is one query, for all of them, of the first of
  train, validation and test that one of them is in. One pair of train, of relevance 1, is a wrong answer: the lowest grade has
  gain 0 in nDCG, and some grade must be the lowest.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catid2_ray.scripts import normalised

SPLITS, SHARES = ("train", "validation", "test"), (0.7, 0.1)  # what is left is test
FEWEST, MOST = 8, 30  # words of a sentence: those with fewer are no queries, of longer ones the first are read
FOUND, WRONG = 3.0, 1.0  # within the thresholds of all recipes, 2.33 to teach and 2.67 to count


class KnownItems(NamedTuple):
    """M products that have a sentence: their `row_M` in the table, a sentence each, and the place of their split in SPLITS."""

    row_M: np.ndarray
    sentences: list[str]
    split_M: np.ndarray


def known_items(titles: Sequence[str | None], descriptions: Sequence[str | None]) -> KnownItems:
    """The products to find and their queries, the same in every call. N products each."""
    rng, rows, sentences, seen = np.random.default_rng(11), [], [], set()
    for row, (title, description) in enumerate(zip(titles, descriptions)):
        title = (title or "").lower()
        words = set(re.findall(r"\w+", title))
        kept = [
            [word for word in re.findall(r"\w+", sentence.lower()) if word not in words]
            for sentence in re.split(r"[.!?;\n]+\s|\|", description or "")
        ]
        kept = [sentence[:MOST] for sentence in kept if len(sentence) >= FEWEST]
        if kept and title not in seen:
            seen.add(title)
            rows.append(row)
            sentences.append(" ".join(kept[rng.integers(len(kept))]))
    split_M, order = np.full(len(rows), SPLITS.index("test")), rng.permutation(len(rows))
    taught, validated = (int(share * len(rows)) for share in (SHARES[0], sum(SHARES)))
    split_M[order[:taught]], split_M[order[taught:validated]] = SPLITS.index("train"), SPLITS.index("validation")
    return KnownItems(np.array(rows, np.int64), sentences, split_M)


def pairs_of(product_ids: Sequence[str], sentences: Sequence[str], split_M: np.ndarray) -> pa.Table:
    """The pairs of M products, a query for each text, and the one wrong answer, where train has a query with one."""
    items: dict[str, list[int]] = {}
    for item, sentence in enumerate(sentences):
        items.setdefault(" ".join(normalised(sentence).split()), []).append(item)
    rows = []
    for sharing in items.values():
        query = (f"q_{product_ids[sharing[0]]}", sentences[sharing[0]])
        split = SPLITS[min(split_M[item] for item in sharing)]
        rows += [(*query, product_ids[item], FOUND, split) for item in sharing]
    taught = next((row for row in rows if row[4] == "train"), None)
    answers = {row[2] for row in rows if taught and row[0] == taught[0]}
    wrong = next((name for name in product_ids if name not in answers), None)
    if taught and wrong:
        rows.append((*taught[:2], wrong, WRONG, "train"))
    names = ("query_id", "query", "product_id", "relevance", "split")
    return pa.table(dict(zip(names, map(list, zip(*rows)))))


def make(data: Path, out: Path) -> dict:
    """Write both tables to `out`; counts of what is in them."""
    if not (data / "products.parquet").exists():
        raise SystemExit(f"no products.parquet in {data}: known-item queries are made of its titles and descriptions")
    if out.resolve() == data.resolve():
        raise SystemExit(f"OUT_FOLDER is DATA_FOLDER {data}, whose products would be overwritten: name another")
    table = pq.read_table(data / "products.parquet")
    if "description" not in table.column_names:
        raise SystemExit(f"the products in {data} have no column description, of which queries are made")
    found = known_items(table["title"].to_pylist(), table["description"].to_pylist())
    if not len(found.row_M):
        raise SystemExit(f"no description in {data} has a sentence of {FEWEST} words that its title lacks")
    products = table.take(pa.array(found.row_M))
    place = products.schema.get_field_index("description")
    products = products.set_column(place, "description", pa.nulls(len(products), pa.string()))
    pairs = pairs_of(products["product_id"].to_pylist(), found.sentences, found.split_M)
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(products, out / "products.parquet")
    pq.write_table(pairs, out / "pairs.parquet")
    rows = list(zip(pairs["query_id"].to_pylist(), pairs["split"].to_pylist(), pairs["relevance"].to_pylist()))
    return {
        "products": len(table), "of these to find": len(products),
        "queries": {split: len({query for query, of, _ in rows if of == split}) for split in SPLITS},
        "to find by split": {split: sum(of == split and grade == FOUND for _, of, grade in rows) for split in SPLITS},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="has products.parquet with descriptions")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="gets products.parquet and pairs.parquet")
    options = parser.parse_args()
    print(json.dumps(make(options.data, options.out)))


if __name__ == "__main__":
    main()
