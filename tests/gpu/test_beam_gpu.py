"""The search on a GPU finds what it finds on the CPU: same IDs, same order, scores to 1e-4; and never waits in a step.

Skipped where there is no CUDA device.
"""

import copy

import numpy as np
import pytest
import torch

from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.lookahead import Ahead, Lookahead, best_words
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.unit.retrieval.test_beam import model_for, random_ids, random_queries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CODES = (24, 300, 16)


@pytest.fixture
def parts():
    ids = random_ids(CODES, 2000, 0)
    return model_for(CODES), Trie.build(ids, codes_per_level=CODES), *random_queries([7, 3, 5], 0)


@pytest.mark.parametrize("normalize", ["level", "vocabulary"])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("beam_width", [12, [5, 30, 80], 3000])
def test_both_devices_give_the_same_results(parts, normalize, filtered, beam_width):
    model, trie, query, mask = parts
    allowed = Filter.of(np.random.default_rng(0).random(trie.rows) < 0.1) if filtered else None
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu, on_gpu = (
        constrained_beam_search(
            chosen, trie, query, mask, beam_width=beam_width, top_k=20, allowed=allowed, normalize=normalize
        )
        for chosen in (model, copy.deepcopy(model).cuda())
    )
    assert torch.equal(on_cpu.count_B, on_gpu.count_B)
    assert torch.equal(on_cpu.docid_BKL, on_gpu.docid_BKL) and torch.equal(on_cpu.row_range_BK2, on_gpu.row_range_BK2)
    torch.testing.assert_close(on_cpu.logp_BK, on_gpu.logp_BK, atol=1e-4, rtol=0)


@pytest.mark.parametrize("logp_weight", [1.0, 0.0])
def test_both_devices_look_ahead_alike(parts, logp_weight, tmp_path):
    model, trie, query, mask = parts
    random = np.random.default_rng(0)
    vectors = VectorStore.write(tmp_path / "vectors", [random.normal(size=(trie.rows, 8))], normalize=True)
    nodes = NodeVectors.write(tmp_path / "nodes", trie, vectors, depth=2)
    settings = Lookahead(logp_weight=logp_weight, vector_weight=5.0, lexical_weight=0.1)
    words = best_words(random.random((3, trie.rows), np.float32), trie, [None] * 3)
    query_BD = random.normal(size=(3, 8))
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu, on_gpu = (
        constrained_beam_search(
            chosen, trie, query, mask, beam_width=12, top_k=20,
            ahead=Ahead(settings, nodes, query_BD, device=chosen.device, words=words),
        )
        for chosen in (model, copy.deepcopy(model).cuda())
    )  # fmt: skip
    assert torch.equal(on_cpu.docid_BKL, on_gpu.docid_BKL) and torch.equal(on_cpu.row_range_BK2, on_gpu.row_range_BK2)
    torch.testing.assert_close(on_cpu.score_BK, on_gpu.score_BK, atol=1e-3, rtol=0)


def test_half_precision_finds_nearly_the_same_scores(parts):
    model, trie, query, mask = parts
    full, half = (
        constrained_beam_search(chosen, trie, query, mask, beam_width=20, top_k=5)
        for chosen in (model, copy.deepcopy(model).cuda().bfloat16())
    )
    torch.testing.assert_close(half.logp_BK[:, 0], full.logp_BK[:, 0], atol=0.15, rtol=0)


def test_a_step_does_not_wait_for_the_device(parts):
    model, trie, query, mask = parts
    decoder = T5Decoder(copy.deepcopy(model).cuda(), codes_per_level=CODES)
    steps = []

    class Watched:
        device, level_logits, log_partition = decoder.device, decoder.level_logits, decoder.log_partition
        encode, codes_per_level = staticmethod(decoder.encode), decoder.codes_per_level

        @staticmethod
        def decode_step(level, *rest):
            steps.append(level)
            # From the first step to the last, any wait of the host for the device is an error.
            torch.cuda.set_sync_debug_mode("error" if level < len(CODES) - 1 else "default")
            return decoder.decode_step(level, *rest)

    constrained_beam_search(decoder, trie, query, mask, beam_width=12, top_k=12)
    try:
        constrained_beam_search(Watched, trie, query, mask, beam_width=12, top_k=12)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [0, 1, 2]
