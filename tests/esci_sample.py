"""A small data set in the shape of the published ESCI files and of ESCI-S, in all three languages, with what real files have.

Categories that are missing, too short, too long, given twice or for another locale; products given twice or without a title; one
ASIN in two locales; both versions; all labels; test products that no training query names; HTML in the texts.
"""

import gzip
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from catid2_ray.catalog.sources.esci import EXAMPLES_FILE, PRODUCTS_FILE

# (words of a title, their order, category path of each kind of product)
SHOPS = {
    "us": {
        "brands": ["Amazer", "Northridge", "Kitchello", "BrightNest"],
        "colours": ["black", "stainless steel", "blue", "white"],
        "extras": ["for women", "2 pack", "heavy duty", "12 oz", "with lid"],
        "title": "{brand} {kind}, {colour}, {extra} - {number} in.",
        "kinds": {
            "water bottle": ["Home & Kitchen", "Kitchen & Dining", "Water Bottles", "Sports Bottles"],
            "frying pan": ["Home & Kitchen", "Kitchen & Dining", "Skillets"],
            "phone case": ["Cell Phones & Accessories", "Cases, Holsters & Sleeves", "Flip Cases"],
            "charging cable": ["Cell Phones & Accessories", "Accessories", "Cables", "USB", "USB-C"],
            "running shoes": ["Clothing, Shoes & Jewelry", "Women", "Shoes", "Athletic"],
            "rain jacket": ["Clothing, Shoes & Jewelry", "Women", "Coats"],
        },
    },
    "es": {
        "brands": ["Montaña", "Cocinea", "Luzdia", "Señorío"],
        "colours": ["negro", "acero inoxidable", "azul", "blanco"],
        "extras": ["para niños", "paquete de 2", "gran tamaño", "350 ml", "con tapa"],
        "title": "{kind} {colour} {brand}, {extra}, {number} cm",
        "kinds": {
            "botella de agua": ["Hogar y cocina", "Cocina", "Botellas", "Deporte"],
            "sartén antiadherente": ["Hogar y cocina", "Cocina", "Sartenes"],
            "funda de móvil": ["Electrónica", "Comunicación móvil y accesorios", "Fundas"],
            "cable de carga": ["Electrónica", "Comunicación móvil y accesorios", "Cables", "USB"],
            "zapatillas de correr": ["Moda", "Mujer", "Zapatos"],
            "chaqueta impermeable": ["Moda", "Mujer", "Abrigos", "Lluvia"],
        },
    },
    "jp": {
        "brands": ["アイリス", "山田製作所", "ＳＯＲＡ", "にほん工房"],
        "colours": ["黒", "ステンレス", "青", "ホワイト"],
        "extras": ["レディース", "2個セット", "大容量", "350ml", "蓋付き"],
        "title": "{brand} {colour}{kind} {extra} 約{number}cm",
        "kinds": {
            "水筒": ["ホーム＆キッチン", "キッチン用品", "水筒・マグボトル", "直飲み"],
            "フライパン": ["ホーム＆キッチン", "キッチン用品", "フライパン"],
            "スマホケース": ["家電＆カメラ", "携帯電話・スマートフォン", "ケース・カバー"],
            "充電ケーブル": ["家電＆カメラ", "携帯電話・スマートフォン", "ケーブル", "USB"],
            "折りたたみ傘": ["ファッション", "レディース", "傘"],
            "ランニングシューズ": ["ファッション", "レディース", "シューズ", "スポーツ"],
        },
    },
}


class Sample(NamedTuple):
    """The folder with both parquet files, the file of categories, and what was written: tables and parsed lines."""

    folder: Path
    categories: Path
    products: pa.Table
    examples: pa.Table
    lines: list[dict]


def write_sample(folder: Path, *, products: int = 96, queries: int = 40, seed: int = 0) -> Sample:
    """`products` and `queries` per locale. Every eighth product has no usable category."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    rows, lines, examples, query_ids = [], [], [], itertools.count(1000)
    for locale in SHOPS:
        made = _products(locale, products, draw)
        rows += made
        lines += _lines(locale, made)
        examples += _examples(locale, made, queries, query_ids, draw)
    # The same ASIN in two locales, each with its own title.
    rows.append({**rows[0], "product_locale": "es", "product_title": "Botella de agua única", "kind": None})
    rows += [{**rows[3]}, {**rows[4], "product_title": None}, {**rows[5], "product_title": "Zzz of another title"}]
    examples += [{**examples[0]}, {**examples[1], "esci_label": "E"}]
    products_table = pa.Table.from_pylist([{k: v for k, v in row.items() if k[0] == "p"} for row in rows])
    for number, row in enumerate(examples):
        row["example_id"] = number
    examples_table = pa.Table.from_pylist(examples)
    pq.write_table(products_table, folder / PRODUCTS_FILE, row_group_size=150)
    pq.write_table(examples_table, folder / EXAMPLES_FILE, row_group_size=900)
    text = [json.dumps(line, ensure_ascii=False) for line in lines]
    path = folder / "esci.json.gz"
    path.write_bytes(gzip.compress(("\n".join([*text, '{"asin": "B0DAMAGED0", "categ']) + "\n").encode()))
    return Sample(folder, path, products_table, examples_table, lines)


def _products(locale: str, count: int, draw: np.random.Generator) -> list[dict]:
    shop, rows = SHOPS[locale], []
    for number in range(count):
        kind = list(shop["kinds"])[number % len(shop["kinds"])]
        words = {name: str(draw.choice(shop[f"{name}s"])) for name in ("brand", "colour", "extra")}
        rows.append(
            {
                "product_id": f"B0{locale.upper()}{number:06d}",
                "product_title": shop["title"].format(kind=kind, number=int(draw.integers(5, 60)), **words),
                "product_description": f"<p>{kind} <b>{words['extra']}</b> &amp; {words['colour']}</p>"
                if number % 3
                else None,
                "product_bullet_point": f"{words['extra']}\n{words['colour']}\n" if number % 4 else None,
                "product_brand": words["brand"] if number % 5 else "",
                "product_color": words["colour"],
                "product_locale": locale,
                "kind": kind,
                "colour": words["colour"],
            }
        )
    return rows


def _lines(locale: str, rows: list[dict]) -> list[dict]:
    """Of every 16 products one has no line, one a path of two names, one of seven; some lines are repeated or of elsewhere."""
    lines = []
    for number, row in enumerate(rows):
        path = SHOPS[locale]["kinds"][row["kind"]]
        if number % 16 == 7:
            continue
        if number % 16 == 15:
            path = path[:2]
        if number % 16 == 3:
            path = [*path, "A", "B", "C"][:7]
        noise = {"attrs": {f"a{number}": number}, "price": "" if number % 2 else 3.5, "reviews": [{"stars": "4.0"}]}
        line = {"type": "product", "locale": locale, "asin": row["product_id"], "category": path, **noise}
        if number % 16 == 1:
            lines.append({**line, "category": path[:1]})
        if number % 16 == 2:
            lines.append({**line, "locale": "de", "category": ["Küche", "Töpfe", "Pfannen", "Groß"]})
        if number % 16 == 4:
            del line["locale"]
        if number % 16 == 5:
            line["product_id"] = line.pop("asin")
        if number % 16 == 6:
            line["category"] = []
        lines.append(line)
    return lines


def _examples(locale: str, rows: list[dict], count: int, query_ids, draw: np.random.Generator) -> list[dict]:
    """Twelve judgements a query; three queries in ten are tests, three in four are in the small version."""
    shop, examples = SHOPS[locale], []
    for number in range(count):
        kind = list(shop["kinds"])[number % len(shop["kinds"])]
        colour = str(draw.choice(shop["colours"]))
        query = {"us": f"{colour} {kind}", "es": f"{kind} {colour}", "jp": f"{kind} {colour}"}[locale]
        department, query_id = shop["kinds"][kind][0], next(query_ids)
        near = [row for row in rows if row["kind"] == kind]
        far = [row for row in rows if row["kind"] != kind]
        for row in [*draw.permutation(near)[:8], *draw.permutation(far)[:4]]:
            if row["kind"] == kind:
                label = "E" if row["colour"] == colour or draw.random() < 0.4 else "S"
            else:
                label = "C" if shop["kinds"][row["kind"]][0] == department else "I"
            examples.append(
                {
                    "example_id": 0, "query": query, "query_id": query_id, "product_id": row["product_id"],
                    "product_locale": locale, "esci_label": label, "small_version": int(number % 4 != 1), "large_version": 1,
                    "split": "test" if number % 10 in (2, 5, 8) else "train",
                }
            )  # fmt: skip
    return examples
