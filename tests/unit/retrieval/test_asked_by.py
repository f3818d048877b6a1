"""Who asks: a generator that was taught users is asked with them, in Python and over HTTP; one that was not says so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from catid2_ray.errors import QueryError
from catid2_ray.generator.users import Reading, User, with_users
from catid2_ray.generator.vocabulary import tokenize
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.explain import explained
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import Retriever
from tests.unit.retrieval.conftest import CODES, SPACE, TITLES

READING = {"tokens": 3, "recent": 2}
USERS = [User(("oak door",), ("p5", "p1", "p2")), None, User(recent=("p3", "gone")), User(("brass", "pipe", "garden"))]


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):
    """The folder of a release whose generator is said to read users."""
    made = tmp_path_factory.mktemp("users")
    for part in ("generator", "trie", "products.arrow"):
        (made / part).symlink_to(folder / part)
    settings = json.loads((folder / "retriever.json").read_text())
    (made / "retriever.json").write_text(json.dumps(settings | {"user": READING}))
    return made


def by_hand(parts, queries, users) -> list[list[tuple]]:
    """(ID, score) of each query, its input written by the function that writes examples, one query at a time."""
    model, tokenizer, trie, _, _ = parts
    answers = []
    for query, user in zip(queries, users):
        user = user or User()
        known = [name for name in user.recent[-READING["recent"] :] if name != "gone"]
        codes_RL = np.array([CODES[int(name[1:])] for name in known], np.int64).reshape(-1, 2)
        line_1W = with_users(
            tokenizer, tokenize(tokenizer, [query], length=8), [" ".join(user.attributes)], np.zeros(len(known), np.int64),
            codes_RL, space=SPACE, attribute_tokens=READING["tokens"], recent=READING["recent"],
        ).input_ids_NT  # fmt: skip
        ids_BT = torch.from_numpy(line_1W).long()
        result = constrained_beam_search(model, trie, ids_BT, ids_BT != tokenizer.pad_token_id, beam_width=6, top_k=6)
        answers.append(
            [
                (SPACE.text(code_L), pytest.approx(score, abs=1e-4))
                for code_L, score in zip(result.docid_BKL[0].tolist(), result.logp_BK[0].tolist())
            ]
        )
    return answers


def test_a_search_reads_users_as_examples_have_them(parts, taught):
    retriever, queries = Retriever.open(taught), TITLES[:4]
    assert retriever.reads_users and retriever.reading == Reading(**READING)
    found = retriever.retrieve(queries, k=6, users=USERS)
    expected = by_hand(parts, queries, USERS)
    assert [[(hit.docid_text, hit.score) for hit in hits] for hits in found] == expected
    nobody = retriever.retrieve(queries, k=6)
    assert nobody[1] == found[1] and nobody[0] != found[0] and nobody[2] != found[2] and nobody[3] != found[3]


def test_products_that_came_since_count_among_those_looked_at(parts, taught):
    retriever = Retriever.open(taught)
    before = retriever.retrieve(["oak table"], k=3, users=[User(recent=("new",))])
    assert before == retriever.retrieve(["oak table"], k=3, users=[User()])
    retriever.put([Newcomer("new", "steel table")], [[2, 0]])
    after = retriever.retrieve(["oak table"], k=3, users=[User(recent=("new",))])
    line_1W = with_users(
        retriever.tokenizer, tokenize(retriever.tokenizer, ["oak table"], length=8), [""], np.zeros(1, np.int64),
        np.array([[2, 0]]), space=SPACE, attribute_tokens=3, recent=2,
    ).input_ids_NT  # fmt: skip
    ids_BT = torch.from_numpy(line_1W).long()
    result = constrained_beam_search(parts[0], retriever.live.view, ids_BT, ids_BT != 0, beam_width=6, top_k=3)
    assert [hit.score for hit in after[0]] == pytest.approx(result.logp_BK[0].tolist(), abs=1e-4)
    retriever.withdraw(["new"])
    assert retriever.retrieve(["oak table"], k=2, users=[User(recent=("new",))]) != before, (
        "it still says what was liked"
    )


def test_an_explanation_is_of_the_same_user(taught):
    retriever = Retriever.open(taught)
    hits = retriever.retrieve(["oak table"], k=3, users=[USERS[0]])[0]
    for hit, said in zip(hits, explained(retriever, "oak table", hits, user=USERS[0])):
        assert said.levels[-1].logp == pytest.approx(hit.logp, abs=1e-4)


def test_a_generator_that_was_taught_no_users_says_so(folder):
    retriever = Retriever.open(folder)
    assert not retriever.reads_users
    with pytest.raises(
        QueryError, match=r"release 'r1' has a generator that reads no users: train it with generator.mix.user"
    ):
        retriever.retrieve(["oak"], k=1, users=[User(("age 20-29",))])
    for wrong in (User("age 20-29"), User(recent="p1"), User((3,))):
        with pytest.raises(QueryError, match="a user's (attributes|recent) must be several texts"):
            retriever.retrieve(["oak"], k=1, users=[wrong])
    with pytest.raises(QueryError, match="1 users for 2 queries"):
        retriever.retrieve(["oak", "door"], k=1, users=[None])
    assert retriever.retrieve(["oak"], k=2, users=[None]) == retriever.retrieve(["oak"], k=2)


def test_a_request_carries_its_user_to_the_search_and_no_other(taught, folder):
    answers = pytest.importorskip("catid2_ray.on_ray.serve.answers")
    from catid2_ray.on_ray.serve.api import RetrieveRequest

    retriever = Retriever.open(taught)
    opened = SimpleNamespace(name="r1", retriever=retriever)
    requests = [
        RetrieveRequest(query=query, k=6, user=list(user.attributes), recent=list(user.recent)) if user else
        RetrieveRequest(query=query, k=6)
        for query, user in zip(TITLES, USERS)
    ]  # fmt: skip
    found = answers.search([answers.Asked(opened, request) for request in requests])
    expected = retriever.retrieve(TITLES[:4], k=6, users=USERS)
    assert [[hit.product_id for hit in one.hits] for one in found] == [
        [hit.product_id for hit in hits] for hits in expected
    ]
    clusters = answers.search(
        [answers.Asked(opened, request.model_copy(update={"mode": "clusters"})) for request in requests]
    )
    assert clusters[0].hits[0].logp != clusters[1].hits[0].logp
    # A release that reads no users answers as for anybody: callers need not know which one they meet during an upgrade.
    plain = SimpleNamespace(name="r0", retriever=Retriever.open(folder))
    anybody = answers.search([answers.Asked(plain, request) for request in requests])
    assert [one.hits for one in anybody] == plain.retriever.retrieve(TITLES[:4], k=6)
