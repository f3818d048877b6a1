"""A replica on a GPU answers as one on the CPU, before and after live changes. Skipped where there is no CUDA device."""

import pytest
import torch

from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.unit.retrieval.conftest import TITLES, folder, parts  # noqa: F401
from tests.unit.retrieval.test_served import copy, encode, served  # noqa: F401

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("search", ["beam", "lookahead"])
def test_both_devices_serve_the_same(served, tmp_path, search):  # noqa: F811
    torch.backends.cuda.matmul.allow_tf32 = False
    ahead = {"search": search, "lookahead": {"logp_weight": 0.1}, "stop_level": None}
    release = copy(served, tmp_path, **ahead)
    NodeVectors.write(
        release / "node_vectors", Trie.open(release / "trie"), VectorStore.open(release / "vectors"), depth=2
    )
    on_cpu, on_gpu = (Retriever.open(release, encode_query=encode, device=device) for device in ("cpu", GPU))

    def same():
        for cpu, gpu in zip(on_cpu.retrieve(TITLES, k=6), on_gpu.retrieve(TITLES, k=6)):
            assert [hit.product_id for hit in gpu] == [hit.product_id for hit in cpu]
            assert [hit.score for hit in gpu] == pytest.approx([hit.score for hit in cpu], abs=1e-3)

    same()
    for retriever in (on_cpu, on_gpu):
        retriever.put([Newcomer("new", "oak hinge")], [(1, 3)], {"material": ["oak"], "price": [9.0]})
        retriever.withdraw(["p1"])
    same()
