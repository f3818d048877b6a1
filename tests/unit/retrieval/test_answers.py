"""From requests to answers: what a request is given does not depend on who shares its batch."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")

from catid2_ray.on_ray.serve.answers import Asked, search
from catid2_ray.on_ray.serve.api import RetrieveRequest
from catid2_ray.retrieval.retriever import Retriever
from tests.unit.retrieval.conftest import TITLES


def test_a_larger_k_of_another_request_widens_no_beam(folder):
    """Also where levels have beams of their own, of which the first is narrower than k."""
    retriever = Retriever.open(folder)
    retriever.widths = [1, 6]
    widths, inner = [], retriever.retrieve

    def retrieve(queries, *, k, beam_width, **options):
        widths.append((len(queries), retriever.widths_for(k, beam_width)))
        return inner(queries, k=k, beam_width=beam_width, **options)

    retriever.retrieve = retrieve
    opened = SimpleNamespace(name="r1", retriever=retriever)
    mine = [Asked(opened, RetrieveRequest(query=title, k=1)) for title in TITLES]
    wide = [Asked(opened, RetrieveRequest(query=title, k=4)) for title in TITLES]
    alone = search(mine)
    widths.clear()
    together = search([*mine, *wide])
    assert widths == [(6, [1, 6]), (6, [4, 6])]
    assert [[hit.product_id for hit in found.hits] for found in together[:6]] == [
        [hit.product_id for hit in found.hits] for found in alone
    ]
    assert all(len(found.hits) == 4 for found in together[6:])
