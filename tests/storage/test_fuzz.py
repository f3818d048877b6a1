"""What fits the OpenAPI description and what does not get a documented answer, and the next good query its products."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("schemathesis")

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ray import serve
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica, api
from tests.stored import unpack

CALLS = [(verb, path) for path, verbs in api.openapi()["paths"].items() for verb in verbs]
CHECKS = [
    schemathesis.checks.not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    """A replica as Serve would make it, of a stored release."""
    recipe = unpack(tmp_path_factory.mktemp("stored"))
    kind = RetrieverReplica.func_or_class
    bare = next(one for one in kind.__mro__ if one.__init__.__qualname__ == "RetrieverReplica.__init__")
    made = bare(AppSettings(store=recipe.store, updates=True, follow=False))
    yield made
    made.serving.end()


@pytest.fixture(scope="module")
def served(replica):
    context = SimpleNamespace(servable_object=replica)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "get_replica_context", lambda: context)
        # What the first request builds cannot be pickled, and other tests of this process deploy the same interface.
        patch.setattr(api, "middleware_stack", None)
        with TestClient(api, raise_server_exceptions=False) as client:
            yield client


def fuzz(client: TestClient, verb: str, path: str, *, examples: int) -> None:
    schema = schemathesis.openapi.from_dict(api.openapi())
    operation = schema[path][verb]
    modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(modes))
    def answered(case):
        asked = case.as_transport_kwargs(base_url="http://testserver")
        answer = schemathesis.Response.from_httpx(client.request(**asked), verify=False)
        # Who waits for a millisecond gets a 504, which is documented and no fault.
        own = answer.status_code == 504 and isinstance(case.body, dict) and (case.body.get("timeout_s") or 60) < 60
        case.validate_response(
            answer, checks=[check for check in CHECKS if not (own and check is schemathesis.checks.not_a_server_error)]
        )

    answered()
    found = client.post("/v1/retrieve", json={"query": "oak shelf", "k": 3})
    assert found.status_code == 200 and len(found.json()["products"]) == 3, found.text


@pytest.mark.parametrize("verb", ["put", "post"])
def test_a_docid_of_no_letters_is_no_fault_of_ours(served, verb):
    product = {"product_id": f"empty docid {verb}", "title": "oak shelf of no ID", "docid": ""}
    answer = served.request(verb, "/v1/products", json={"products": [product]})
    assert answer.status_code == 200 and answer.json()["products"][0]["docid"].startswith("<a_"), answer.text


@pytest.mark.parametrize(("verb", "path"), CALLS)
def test_every_answer_is_documented(served, verb, path):
    fuzz(served, verb, path, examples=30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("verb", "path"), CALLS)
def test_every_one_of_a_thousand_answers_is_documented(served, verb, path):
    fuzz(served, verb, path, examples=1000)
