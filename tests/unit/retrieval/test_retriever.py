"""Queries in, products out: from a folder as a release lays it out, with every refusal in words."""

import json

import numpy as np
import pytest

from catid2_ray.errors import ArtifactError, QueryError, ReleaseError
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.rescoring import Hit
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie
from tests.unit.retrieval.conftest import CODES, TITLES


def test_a_trained_generator_finds_the_product_of_its_title(folder):
    retriever = Retriever.open(folder)
    assert retriever.release == "r1"
    answers = retriever.retrieve(TITLES, k=2)
    assert [hits[0].title for hits in answers] == TITLES
    best = answers[2][0]
    assert (
        best == Hit("p2", "<a_2><b_3>", best.score, "copper pipe 10 ft", logp=best.score) and -1.0 < best.score <= 0.0
    )
    assert all(hits[0].score > hits[1].score and len(hits) == 2 for hits in answers)


def test_batches_change_nothing_and_k_widens_the_beam(parts, folder):
    model, tokenizer, trie, product_ids, titles = parts
    narrow = Retriever(model, tokenizer, trie, product_ids, titles=titles, beam_width=1, query_tokens=8, batch=2)
    expected = Retriever.open(folder).retrieve(TITLES, k=1000)
    answers = narrow.retrieve(TITLES, k=1000)
    assert [[hit.product_id for hit in hits] for hits in answers] == [
        [hit.product_id for hit in hits] for hits in expected
    ]
    assert all(len(hits) == 6 for hits in answers)
    assert narrow.retrieve([], k=3) == []


def test_products_that_share_an_id_are_all_named_and_filters_hold(parts):
    model, tokenizer, _, _, _ = parts
    trie = Trie.build(np.concatenate((CODES, CODES[:1])), codes_per_level=(4, 4), shared=True)
    retriever = Retriever(model, tokenizer, trie, [f"p{row}" for row in trie.order_N], query_tokens=8)
    hits = retriever.retrieve(["steel hinge"], k=3)[0]
    assert [hit.product_id for hit in hits[:2]] == ["p0", "p6"] and hits[0].title is None and len(hits) == 3
    allowed = trie.order_N != 0
    index = FilterIndex({"product_id": retriever.products.product_ids})
    for chosen in (allowed, index.compile({"not": {"products": ["p0"]}})):
        kept = retriever.retrieve(["steel hinge"], k=3, allowed=chosen)[0]
        assert kept[0].product_id == "p6" and "p0" not in [hit.product_id for hit in kept]


def test_odd_but_answerable_queries(folder):
    retriever = Retriever.open(folder)
    answers = retriever.retrieve(["東京 ✓", "--8", "<a_2> </s>", "oak " * 100], k=1)
    assert [len(hits) for hits in answers] == [1, 1, 1, 1]


def test_queries_that_cannot_be_answered(folder):
    retriever = Retriever.open(folder)
    for query in ("", " \t\n", "???", "\u200b", "\x00", "---"):
        with pytest.raises(QueryError, match="at least one letter or digit"):
            retriever.retrieve(["oak", query], k=1)
    with pytest.raises(QueryError, match="may have 2000 characters, found 2001"):
        retriever.retrieve(["x" * 2001], k=1)
    for k in (0, 1001, True, 2.5):
        with pytest.raises(QueryError, match="k must be a whole number from 1 to 1000"):
            retriever.retrieve(["oak"], k=k)


def test_a_folder_that_is_no_release_is_refused(parts, folder, tmp_path):
    with pytest.raises(ArtifactError, match="retriever.json, products.arrow, generator, trie missing"):
        Retriever.open(tmp_path)
    for part in ("generator", "trie", "products.arrow"):
        (tmp_path / part).symlink_to(folder / part)
    settings = json.loads((folder / "retriever.json").read_text())
    (tmp_path / "retriever.json").write_text(json.dumps(settings | {"codes_per_level": [4, 5]}))
    with pytest.raises(ReleaseError, match="take both from one release"):
        Retriever.open(tmp_path)
    (tmp_path / "retriever.json").write_text("{")
    with pytest.raises(ArtifactError, match="publish it again"):
        Retriever.open(tmp_path)
    with pytest.raises(ReleaseError, match="5 product ids for 6 trie rows"):
        Retriever(*parts[:3], ["p"] * 5)
