"""What the search computes and how often: one encoder pass, cross-attention's keys once, a level's rows of the head.

Counted by hooks on a plain T5, so that a change that repeats work fails here before a benchmark tells.
"""

import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from tests.oracles.beam import Table
from tests.unit.retrieval.test_beam import WORDS, model_for, random_ids, random_queries

CODES = (8, 9, 10)
WIDE = {"beam_width": 6, "top_k": 6, "levels": 2}


@pytest.fixture
def parts():
    ids = random_ids(CODES, 200, 0)
    return model_for(CODES), Trie.build(ids, codes_per_level=CODES), *random_queries([7, 3, 5], 0)


class Shapes(TorchDispatchMode):
    """The name and the shapes of the results of every tensor operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.seen.append((str(function), [tuple(one.shape) for one in results if isinstance(one, torch.Tensor)]))
        return result


def test_the_encoder_runs_once_and_cross_keys_are_computed_once_per_query(parts):
    model, trie, query, mask = parts
    encoded, projected, attended = [], [], []
    model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output[0].shape))
    for block in model.decoder.block:
        for name in ("k", "v"):
            part = getattr(block.layer[1].EncDecAttention, name)
            part.register_forward_hook(lambda module, inputs, output: projected.append(tuple(output.shape)))
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(queries, keys, values, **settings):
        attended.append((tuple(queries.shape), tuple(keys.shape), tuple(values.shape)))
        return plain(queries, keys, values, **settings)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        constrained_beam_search(model, trie, query, mask, beam_width=[5, 6, 7], top_k=7)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    assert encoded == [(3, 7, 16)]
    # Two layers, keys and values: of 3 queries × 7 tokens, however many beams there are.
    assert projected == [(3, 7, 16)] * 4
    # The encoder's own come first; then each step's, over one set of keys per query.
    assert attended[-6:] == [((3, 2, beams, 8), (3, 2, 7, 8), (3, 2, 7, 8)) for beams in (1, 5, 6) for _ in range(2)]


@pytest.mark.parametrize(("normalize", "whole"), [("level", False), ("vocabulary", True)])
def test_level_scores_never_multiply_the_full_head(parts, normalize, whole):
    model, trie, query, mask = parts
    with Shapes() as shapes:
        constrained_beam_search(model, trie, query, mask, beam_width=5, top_k=5, normalize=normalize)
    vocabulary = WORDS + sum(CODES)
    wide = [name for name, results in shapes.seen for shape in results if len(shape) > 1 and shape[-1] == vocabulary]
    assert bool(wide) == whole
    heads = [shape for _, results in shapes.seen for shape in results if shape[-1:] in [(k,) for k in CODES]]
    assert heads


@pytest.mark.parametrize("filtered", [False, True])
def test_shapes_do_not_depend_on_what_the_beams_hold(parts, filtered):
    model, trie, query, mask = parts
    constrained_beam_search(model, trie, query, mask, beam_width=1, top_k=1)
    seen = []
    for seed in range(3):
        query, mask = random_queries([6, 6], seed)
        allowed = Filter.of(np.random.default_rng(seed).random(trie.rows) < 0.1 * seed) if filtered else None
        assert allowed is None or allowed.tensors()
        with Shapes() as shapes:
            constrained_beam_search(model, trie, query, mask, beam_width=[4, 30, 90], top_k=20, allowed=allowed)
        seen.append(shapes.seen)
    assert len(seen[0]) > 100 and seen[0] == seen[1] == seen[2]


def test_no_step_reads_a_tensor_on_the_host(parts):
    """`item`, `nonzero` and masks as an index wait for the device; from the first step to the last there is none."""
    model, trie, query, mask = parts
    table, steps = Table(CODES, 3, 0), []

    class Watched:
        device, codes_per_level = table.device, table.codes_per_level
        encode, level_logits, log_partition = table.encode, table.level_logits, table.log_partition

        @staticmethod
        def decode_step(*arguments):
            steps.append(len(shapes.seen))
            return table.decode_step(*arguments)

    with Shapes() as shapes:
        constrained_beam_search(Watched, trie, query, mask, beam_width=12, top_k=12, allowed=Filter.all_of(trie.rows))
    names = [name for name, _ in shapes.seen[steps[0] : steps[-1]]]
    assert len(steps) == 3 and len(names) > 20
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
        ),
    ],
)
def test_a_compiled_step_finds_the_same(parts, backend):
    """One graph per level without a break, and none anew for other queries."""
    model, trie, query, mask = parts
    plain, decoder = (T5Decoder(model, codes_per_level=CODES) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder.decode_step = torch.compile(decoder.decode_step, fullgraph=True, dynamic=False, backend=backend)
    for asked in (query, query.flip(0)):
        mine, expected = (
            constrained_beam_search(one, trie, asked, mask.flip(0) if asked is not query else mask, **WIDE)
            for one in (decoder, plain)
        )
        assert torch.equal(mine.docid_BKL, expected.docid_BKL)
        torch.testing.assert_close(mine.logp_BK, expected.logp_BK, atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
