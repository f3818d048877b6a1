"""`serve deploy serve_config.yaml` on a Ray cluster that is already running, as docs/operations.md says: with a token, and the file
of the repository but for store and port. What is deployed answers, another release is deployed over it, and what cannot be served
says why in `serve status`.
"""

import subprocess
import time

import httpx
import pytest
import yaml

from tests.command import ROOT
from tests.end_to_end.test_replicas_under_load import free_port
from tests.jobs.test_submit import BIN, head  # noqa: F401 (a fixture)
from tests.stored import two_releases

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def deploy(head, tmp_path):  # noqa: F811
    """`deploy(**changes of the application's args)`: on a port of the test's own, which is `deploy.port`."""
    environment, address = head

    def serve(*words: str) -> str:
        run = subprocess.run(
            [BIN / "serve", *words, "--address", address], env=environment, capture_output=True, text=True, timeout=180
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def deploy(**changes) -> None:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = deploy.port
        config["applications"][0]["args"] |= changes
        path = tmp_path / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        serve("deploy", str(path))

    deploy.port, deploy.status = free_port(), lambda: serve("status")
    yield deploy
    serve("shutdown", "-y")


def served(port: int, release: str, seconds: float = 180) -> None:
    deadline, said = time.monotonic() + seconds, None
    while not said or said.get("release") != release:
        assert time.monotonic() < deadline, said
        time.sleep(0.5)
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/release", timeout=30)
            said = answer.json() if answer.status_code == 200 else {"status": answer.status_code}
        except httpx.HTTPError as error:
            said = {"error": repr(error)}


@pytest.mark.timeout(600)
def test_what_is_deployed_answers_and_what_cannot_be_served_says_why(deploy, tmp_path):
    store, first, second = two_releases(tmp_path)
    deploy(store=store.uri)
    served(deploy.port, second)
    answer = httpx.post(
        f"http://127.0.0.1:{deploy.port}/v1/retrieve", json={"query": "steel hinge", "k": 5}, timeout=60
    )
    assert len(answer.raise_for_status().json()["products"]) == 5
    deploy(store=store.uri, release=first)
    served(deploy.port, first)
    deploy(store="catid2_store")
    deadline = time.monotonic() + 120
    while "DEPLOY_FAILED" not in (said := deploy.status()):
        assert time.monotonic() < deadline, said
        time.sleep(0.5)
    assert "relative path" in said, said
