"""A generator trained on six titles, and a folder as a release lays it out: what the retriever's tests look at."""

import json

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.docid import DocidSpace
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.step import fit
from catid2_ray.generator.vocabulary import tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.retrieval.trie import Trie

SPACE = DocidSpace((4, 4))
TITLES = ["steel hinge", "brass hinge", "copper pipe 10 ft", "oak door", "oak table", "garden hose"]
CODES = np.array([[0, 1], [0, 0], [2, 3], [1, 1], [1, 0], [3, 2]])


@pytest.fixture(scope="session")
def parts():
    tokenizer = train_tokenizer(TITLES * 3, size=100)
    model = small_t5(
        vocabulary=len(tokenizer), width=32, layers=1, heads=2, feed_forward=32, dropout=0.0, codes_per_level=(4, 4)
    )
    with_docid_tokens(tokenizer, SPACE)
    examples = Examples({"title": tokenize(tokenizer, TITLES, length=8)}, {"title": CODES})
    fit(model, examples, space=SPACE, steps=80, batch=6, learning_rate=0.01, warmup_share=0.05)
    trie = Trie.build(CODES, codes_per_level=(4, 4))
    return model, tokenizer, trie, [f"p{row}" for row in trie.order_N], [TITLES[row] for row in trie.order_N]


@pytest.fixture(scope="session")
def folder(parts, tmp_path_factory):
    model, tokenizer, trie, product_ids, titles = parts
    folder = tmp_path_factory.mktemp("release")
    model.save_pretrained(folder / "generator")
    tokenizer.save_pretrained(folder / "generator")
    trie.save(folder / "trie")
    table = pa.table({"product_id": product_ids, "title": titles})
    with pa.ipc.new_file(folder / "products.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    settings = {"beam_width": 6, "query_tokens": 8, "normalize": "level", "codes_per_level": [4, 4], "release": "r1"}
    (folder / "retriever.json").write_text(json.dumps(settings))
    return folder
