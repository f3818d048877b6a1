"""What the search refuses, and in which words; and what is odd but has an answer."""

import numpy as np
import pytest
import torch

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from tests.oracles.beam import Table
from tests.unit.retrieval.test_beam import model_for, random_ids, random_queries

USUAL = {"beam_width": 3, "top_k": 3}


@pytest.fixture
def search():
    """A call of the search on one model, trie and query, with some of it changed."""
    trie, model = Trie.build(random_ids((4, 4), 9, 0), codes_per_level=(4, 4)), model_for((4, 4))
    query, mask = random_queries([5], 0)

    def run(*, model=model, trie=trie, query=query, mask=mask, **changed):
        return constrained_beam_search(model, trie, query, mask, **(USUAL | changed))

    run.model, run.trie, run.query, run.mask = model, trie, query, mask
    return run


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"beam_width": 0}, "beam_width must be one whole number ≥ 1, or 2 of them, found 0"),
        ({"beam_width": [3, 0]}, r"or 2 of them, found \[3, 0\]"),
        ({"beam_width": [3, 3, 3]}, "or 2 of them"),
        ({"beam_width": 2.7}, "whole number ≥ 1, or 2 of them, found 2.7"),
        ({"beam_width": [3, 2.7]}, r"or 2 of them, found \[3, 2.7\]"),
        ({"beam_width": None}, "or 2 of them, found None"),
        ({"beam_width": True}, "or 2 of them, found True"),
        ({"top_k": 0}, "top_k must be a whole number ≥ 1"),
        ({"top_k": 2.5}, "top_k must be a whole number ≥ 1 .*, found 2.5"),
        ({"top_k": None}, "found None"),
        ({"levels": 0}, "levels must be a whole number from 1 to 2, or None for all, found 0"),
        ({"levels": 3}, "from 1 to 2, or None for all, found 3"),
        ({"levels": 1.5}, "or None for all, found 1.5"),
        ({"levels": 1, "beam_width": [3, 3]}, "or 1 of them"),
        ({"allowed": [None, None]}, "allowed has 2 filters for 1 queries"),
        ({"allowed": "stock"}, "allowed must be a filter or .* booleans, one per trie row, found str"),
        ({"model": Table((4, 5), 1, 0)}, r"the decoder has codes per level \[4, 5\], the trie's IDs have \[4, 4\]"),
        ({"normalize": "beam"}, "normalize one of level, vocabulary, trie, found 3 and 'beam'"),
        ({"allowed": np.ones(3, bool)}, "booleans, one per trie row"),
        ({"allowed": np.ones(9)}, "booleans, one per trie row, found torch.float64"),
        ({"allowed": Filter.of(np.ones(3, bool))}, "the filter is over 3 rows, the trie has .*; take both from one release"),
        ({"model": model_for((4, 5))}, "the model does not fit the trie: .* take model and trie from one release"),
        ({"trie": Trie.build(random_ids((4, 5), 9, 0), codes_per_level=(4, 5))}, "the model does not fit the trie"),
    ],
)  # fmt: skip
def test_bad_settings_and_parts_of_other_releases_are_refused(search, changed, message):
    with pytest.raises(InputError, match=message):
        search(**changed)


def test_bad_queries_are_refused(search):
    with pytest.raises(InputError, match="query 0 of the batch has no token"):
        search(mask=search.mask * 0)
    with pytest.raises(InputError, match="must both be B×T"):
        search(mask=search.mask[:, 1:])
    with pytest.raises(InputError, match="the batch has no query"):
        search(query=search.query[:0], mask=search.mask[:0])
    with pytest.raises(InputError, match="input_ids must be whole numbers, found torch.float32"):
        search(query=search.query.float())
    for token in (28, -1):
        query = search.query.clone()
        query[0, 2] = token
        with pytest.raises(InputError, match=f"token 2 of query 0 is {token}, the model knows 0 to 27"):
            search(query=query)


def test_a_ready_decoder_is_compared_with_the_trie(search):
    ready = T5Decoder(model_for((4, 3)), codes_per_level=(4, 3))
    with pytest.raises(InputError, match=r"has codes per level \[4, 3\], the trie's IDs have \[4, 4\]"):
        search(model=ready)
    with pytest.raises(InputError, match=r"has codes per level \[4, 3\]"):
        search(model=ready, levels=1)
    table = Table((4, 4), 1, 0)
    del table.codes_per_level
    with pytest.raises(InputError, match="the decoder does not say its codes_per_level"):
        search(model=table)


def test_a_model_without_room_for_the_ids_and_unknown_weights_are_refused(search):
    with pytest.raises(InputError, match="weights must be 'float32' or 'int8', found 'int4'"):
        T5Decoder(search.model, codes_per_level=(4, 4), weights="int4")
    search.model.config.docid_codes_per_level = None
    with pytest.raises(InputError, match="28 vocabulary rows.* need 30"):
        T5Decoder(search.model, codes_per_level=(15, 15))


@pytest.mark.parametrize("normalize", ["level", "vocabulary", "trie"])
def test_logits_that_are_no_numbers_are_refused(search, normalize):
    with torch.no_grad():
        search.model.decoder.final_layer_norm.weight[0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite logits"):
        search(normalize=normalize)
    table = Table((4, 4), 1, 0)
    table.logits[1][0, 2, 1] = torch.nan
    table.log_partition = lambda level, hidden_BMD, prefix_BML: torch.zeros(prefix_BML.shape[:2])
    with pytest.raises(InputError, match="NaN or infinite logits"):
        search(model=table, normalize=normalize, beam_width=99)


def test_more_results_than_the_filter_allows_give_what_there_is(search):
    allowed = np.arange(search.trie.rows) == 4
    for chosen in (allowed, Filter.of(allowed)):
        result = search(allowed=chosen, top_k=50)
        assert result.count_B.tolist() == [1] and result.row_range_BK2[0, 0].tolist() == [4, 5]
        assert result.docid_BKL.shape == (1, 50, 2) and (result.docid_BKL[:, 1:] == -1).all()


def test_an_empty_filter_gives_nothing(search):
    for chosen in (np.zeros(search.trie.rows, bool), Filter.of(np.zeros(search.trie.rows, bool))):
        result = search(allowed=chosen)
        assert result.count_B.tolist() == [0] and (result.docid_BKL == -1).all()
        assert (result.row_range_BK2 == 0).all() and (result.logp_BK == -torch.inf).all()


def test_codes_that_a_model_rules_out_are_never_returned(search):
    table = Table((4, 4), 1, 0)
    table.logits[0][0, :2] = -torch.inf
    result = search(model=table, beam_width=99, top_k=99)
    assert 0 < int(result.count_B) < search.trie.rows
    assert (result.docid_BKL[0, : int(result.count_B), 0] >= 2).all()
