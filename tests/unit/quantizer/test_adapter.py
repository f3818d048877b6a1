"""The adapter: its loss against loops, on one rank and on two; the vectors it makes; what it learns, and when it learns nothing."""

import copy

import numpy as np
import pytest
import torch

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.quantizer.adapter import FILE, LinearAdapter, Probe, adapter_loss, fit, pair_order
from tests.oracles import adapter as oracle
from tests.unit.quantizer.test_quantizer_ranks import run_threads

D = 6


def pairs(rows: int = 14):
    """Vectors, and ids of which some queries and some products come twice."""
    rng = np.random.default_rng(2)
    query_B, product_B = np.arange(rows) // 2, np.arange(rows) * 5 % 9
    query_BD, product_BD = rng.normal(size=(rows, D))[query_B], rng.normal(size=(9, D))[product_B]
    return [torch.from_numpy(array) for array in (query_BD, product_BD, query_B, product_B)]


def some_adapter() -> LinearAdapter:
    adapter = LinearAdapter(D).double()
    with torch.no_grad():
        for matrix_DD in adapter.parameters():
            matrix_DD += 0.3 * torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return adapter


def value(*arguments) -> float:
    return float(adapter_loss(*arguments).detach())


def test_the_loss_is_that_of_the_loops():
    adapter, batch = some_adapter(), pairs()
    matrices = [matrix.detach().numpy() for matrix in (adapter.product_DD, adapter.query_DD)]
    expected = oracle.loss(*matrices, *(column.numpy() for column in batch))
    assert value(adapter, *batch) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("split", [1, 7, 13])
def test_two_ranks_have_the_loss_and_the_averaged_gradient_of_one(split):
    adapter, batch = some_adapter(), pairs()
    whole = adapter_loss(adapter, *batch)
    expected = torch.autograd.grad(whole, list(adapter.parameters()))
    shards = [[column[:split] for column in batch], [column[split:] for column in batch]]
    found = run_threads(lambda *columns: adapter_loss(adapter, *columns[:-1], gather=columns[-1]), shards)
    torch.testing.assert_close(found, [whole, whole], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(sum(found) / 2, list(adapter.parameters())), expected, rtol=0, atol=1e-10
    )


def test_false_negatives_are_no_negatives():
    """Neither another product of a query nor the product under another query counts."""
    query_BD, product_BD, query_B, product_B = pairs(4)
    query_B, product_B = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 2])
    shared = torch.zeros_like(query_B)
    assert value(LinearAdapter(D).double(), query_BD, product_BD, shared, product_B) == 0
    assert value(LinearAdapter(D).double(), query_BD, product_BD, query_B, shared) == 0
    assert value(LinearAdapter(D).double(), query_BD, product_BD, query_B, product_B) > 0


def test_vectors_have_length_1_and_do_not_depend_on_their_neighbours(tmp_path):
    adapter, vector_ND = some_adapter().float(), np.random.default_rng(0).normal(size=(1500, D)).astype(np.float32)
    adapter.save(tmp_path)
    loaded = LinearAdapter.load(tmp_path)
    for name, matrix_DD in (("products", adapter.product_DD), ("queries", adapter.query_DD)):
        found_ND = getattr(loaded, name)(vector_ND)
        plain_ND = vector_ND.astype(np.float64) @ matrix_DD.detach().numpy().astype(np.float64).T
        np.testing.assert_allclose(found_ND, plain_ND / np.linalg.norm(plain_ND, axis=1, keepdims=True), atol=1e-6)
        assert np.array_equal(getattr(loaded, name)(vector_ND[[1400]])[0], found_ND[1400]), "bit for bit"
    assert not loaded.products(np.zeros((1, D), np.float32)).any()
    with pytest.raises(InputError, match=r"reads vectors N×6, found \(2, 3\)"):
        loaded.products(np.zeros((2, 3), np.float32))


def test_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a file of tensors")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="holds no adapter .*refresh-adapter"):
            LinearAdapter.load(folder)


def probe(seed: int = 0, products: int = 300, queries: int = 40) -> tuple[Probe, list[set[int]]]:
    rng = np.random.default_rng(seed)
    relevant = [set(rng.choice(products, size=rng.integers(1, 6), replace=False).tolist()) for _ in range(queries)]
    made = Probe(
        query_QD=rng.normal(size=(queries, D)).astype(np.float32), product_ND=rng.normal(size=(products, D)).astype(np.float32),
        query_P=np.array([q for q, wanted in enumerate(relevant) for _ in wanted]),
        product_P=np.array([p for wanted in relevant for p in sorted(wanted)]),
    )  # fmt: skip
    return made, relevant


def test_recall_is_that_of_the_loops():
    made, relevant = probe()
    for adapter in (None, some_adapter().float()):
        query_QD, product_ND = made.query_QD, made.product_ND
        if adapter is not None:
            query_QD, product_ND = adapter.queries(query_QD), adapter.products(product_ND)
        found = made.recall(adapter, (10, 100))
        assert found == {
            str(cut): pytest.approx(oracle.recall(query_QD, product_ND, relevant, cut=cut)) for cut in (10, 100)
        }


def turned(rows: int = 400):
    """Pairs whose queries lie where their products lie, turned by a fixed rotation."""
    rng = np.random.default_rng(4)
    product_ND = rng.normal(size=(rows, D)).astype(np.float32)
    rotation_DD = np.linalg.qr(np.eye(D) + 0.6 * rng.normal(size=(D, D)))[0]
    query_ND = (product_ND @ rotation_DD + 0.1 * rng.normal(size=(rows, D))).astype(np.float32)
    ids = torch.arange(rows)
    return [torch.from_numpy(query_ND), torch.from_numpy(product_ND), ids, ids.clone()]


def test_what_can_be_learned_is_learned_and_the_best_epoch_is_taken():
    columns = turned()
    held = Probe(
        query_QD=columns[0][:50].numpy(), product_ND=columns[1].numpy(), query_P=np.arange(50), product_P=np.arange(50)
    )

    def recall(adapter):
        return held.recall(adapter, (5,))["5"]

    settings = {"epochs": 4, "batch": 64, "learning_rate": 3e-2, "recall": recall}
    adapter, history = fit(*[column[50:] for column in columns], **settings)
    scores = [record["score"] for record in history]
    assert scores[0] == held.recall(None, (5,))["5"] and len(scores) == 5
    assert recall(adapter) == max(scores) > scores[0] + 0.2
    again, _ = fit(*[column[50:] for column in columns], **settings)
    assert torch.equal(again.product_DD, adapter.product_DD)


def test_an_adapter_that_diverged_finds_nothing():
    """Nothing is before what scores NaN, so that it would have been adopted with recall 1."""
    product_ND = np.eye(5, D, dtype=np.float32)
    probe = Probe(query_QD=product_ND[3:], product_ND=product_ND, query_P=np.arange(2), product_P=np.array([3, 4]))
    broken = LinearAdapter(D)
    with torch.no_grad():
        broken.query_DD.fill_(torch.nan)
    assert [probe.recall(adapter, (10,))["10"] for adapter in (None, LinearAdapter(D), broken)] == [1, 1, 0]


def test_an_adapter_that_lowers_recall_is_the_identity():
    calls = iter([0.5, 0.4, 0.3])
    adapter, history = fit(*pairs_float(), recall=lambda _: next(calls), epochs=2, batch=8)
    assert [record["score"] for record in history] == [0.5, 0.4, 0.3]
    assert all(torch.equal(matrix, torch.eye(D)) for matrix in adapter.parameters())
    with pytest.raises(InputError, match="found none"):
        fit(*(column[:0] for column in pairs_float()), recall=lambda _: 0.0)


def pairs_float():
    query_BD, product_BD, *ids = pairs()
    return [query_BD.float(), product_BD.float(), *ids]


def test_reset_and_order():
    adapter = copy.deepcopy(some_adapter())
    adapter.reset()
    assert torch.equal(adapter.query_DD, torch.eye(D, dtype=torch.float64))
    first = pair_order(20, seed=1, epoch=0)
    assert sorted(first) == list(range(20)) and not np.array_equal(first, pair_order(20, seed=1, epoch=1))
    assert np.array_equal(first, pair_order(20, seed=1, epoch=0))
