"""The figures of an alignment: concentration and recall with known answers, a measured model, the table and the page."""

import numpy as np
import pytest
import torch

from catid2_ray.errors import InputError
from catid2_ray.evaluation.alignment_report import (
    alignment_page,
    alignment_table,
    concentration,
    measure,
    recalls_of_ids,
)
from catid2_ray.evaluation.metrics import recalls
from catid2_ray.evaluation.tables import terminal
from catid2_ray.retrieval.environment import Environment, Rules
from tests.unit.retrieval.test_environment import TRIE, prompts, small


def test_concentration_counts_rollouts_on_the_commonest_ids():
    packed_R = np.array([7] * 6 + [3] * 2 + [1, 2])
    assert concentration(packed_R, ids=99) == {"top_1_percent": 0.6, "distinct": 0.4}
    assert concentration(packed_R, ids=250)["top_1_percent"] == 0.8
    with pytest.raises(InputError, match="measure at least one query"):
        concentration(np.array([]), ids=5)


def test_recall_of_unique_ids_is_the_papers_recall():
    rng = np.random.default_rng(0)
    found_BK = np.stack([rng.permutation(30)[:12] for _ in range(20)])
    found_BK[3, 5:] = -1
    judged_BJ = np.stack([rng.permutation(30)[:8] for _ in range(20)])
    relevant_BJ = (rng.random((20, 8)) < 0.5).astype(np.int32)
    relevant_BJ[7] = 0
    judged_BJ[:, -1], relevant_BJ[:, -1] = -1, 0
    expected = recalls(
        [[str(i) for i in row if i >= 0] for row in found_BK],
        [{str(i) for i, r in zip(row, flags) if r} for row, flags in zip(judged_BJ, relevant_BJ)], (1, 5, 12),
    )  # fmt: skip
    found = recalls_of_ids(
        *(torch.from_numpy(x) for x in (found_BK, (found_BK >= 0).astype(np.int64), judged_BJ, relevant_BJ)), (1, 5, 12)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_shared_id_takes_as_many_ranks_as_it_has_products():
    found = recalls_of_ids(
        torch.tensor([[4, 9]]), torch.tensor([[4, 1]]), torch.tensor([[4, 9]]), torch.tensor([[2, 1]]), (1, 2, 4, 5)
    )
    np.testing.assert_allclose(found[0], [2 / 4 / 3, 2 * 2 / 4 / 3, 2 / 3, 1], rtol=1e-6)


def measured(batch=64):
    asked = prompts(5)
    return measure(
        small(), small(), Environment(TRIE, Rules(group=4, source="beam", beam_width=8)),
        lambda rows: asked(rows) | {"relevant": (asked(rows)["reward"] > 0.4).int()}, count=5, batch=batch,
        beam_width=60,
    )  # fmt: skip


def test_a_model_measured_against_itself_has_no_kl_and_batches_do_not_matter():
    figures = measured()
    assert figures["kl"] == pytest.approx(0, abs=1e-6) and 0 < figures["entropy"] < 3 * np.log(5)
    assert figures["recall@50"] > figures["recall@10"] >= figures["recall@1"]
    assert 0 < figures["top_1_mass"] < 1 and figures["queries"] == 5
    assert measured(batch=2) == pytest.approx(figures, rel=1e-5)


def test_the_table_and_the_page_show_before_and_after(capsys):
    before = measured()
    after = before | {"reward": before["reward"] + 0.1, "kl": 0.5}
    step = {"reward": 0.2, "kl": 0.1, "entropy": 2.0, "without_variance": 0.3}
    history = [{"epoch": 0, **step, "before": before}, {"epoch": 1, **step, "before": before, "after": after}]
    from rich.console import Console

    Console(width=112).print(terminal([alignment_table(before, after)]))
    shown = capsys.readouterr().out
    assert "measured on 5 queries" in shown and "+0.1000" in shown and "flat groups" in shown
    page = alignment_page(history, title="Alignment <of> a shop", about={"group": 8, "ranker": None})
    assert "data:image/png;base64," in page and "Alignment &lt;of&gt; a shop" in page and "+0.5000" in page
    assert '<p class="verdict look"><b>!</b> Alignment did not move recall@10 (' in page
