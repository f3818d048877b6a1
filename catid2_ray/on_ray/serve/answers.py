"""From requests to answers, with one release: the search of a batch, and what is said of a product beside its score.

All of it is slow work for a thread, and knows neither HTTP nor Ray.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from catid2_ray.errors import InputError
from catid2_ray.generator.users import User
from catid2_ray.on_ray.serve.api import (
    Answer,
    BelowResponse,
    Category,
    Cluster,
    Degraded,
    Explain,
    Level,
    Member,
    NextCode,
    Product,
    ProductResponse,
    RetrieveRequest,
    Word,
)
from catid2_ray.on_ray.serve.opened import Opened
from catid2_ray.on_ray.serve.refusals import Unserved
from catid2_ray.retrieval.below import below, category_of, top_words
from catid2_ray.retrieval.explain import explained
from catid2_ray.retrieval.live_view import LiveView, codes_of
from catid2_ray.retrieval.rescoring import Hit
from catid2_ray.retrieval.retriever import Retriever, Soft

TIMEOUT_HEADER = "x-request-timeout-seconds"  # Ray's proxy reads it, too


class Asked(NamedTuple):
    """A request of one query, the release that answers it, and when its soft timeout is over (of `time.monotonic()`)."""

    opened: Opened
    request: RetrieveRequest
    soft: float | None = None

    @property
    def user(self) -> User | None:
        """Who asks, where the release reads that. Where it does not, as during an upgrade, the answer is everybody's."""
        return self.request.asker if self.opened.retriever.reads_users else None


class Found(NamedTuple):
    """`levels`: those that were searched, where the search ended early; else None."""

    hits: list[Hit] | list[Cluster]
    levels: int | None = None


def deadline_of(request: RetrieveRequest, headers: Mapping[str, str]) -> float | None:
    """A time of `time.monotonic()`; None where the caller waits for ever. As Ray does, what is no number above 0 is none."""
    try:
        told = float(headers.get(TIMEOUT_HEADER, "inf"))
    except ValueError:
        told = math.inf
    waits = min(told if told > 0 else math.inf, request.timeout_s or math.inf)
    return time.monotonic() + waits if waits < math.inf else None


def search(requests: list[Asked], early: Callable[[int, Found], None] = lambda number, found: None) -> list[Found]:
    """Requests of one release and the same beams go together: a k above a level's beam widens that, and must not widen it for
    others. `early` gets the number of a request and its answer where that is there before the others', because its soft timeout
    was over."""
    groups: dict[tuple, list[int]] = {}
    for number, (opened, request, _) in enumerate(requests):
        widths = tuple(opened.retriever.widths_for(request.k, request.beam_width))
        groups.setdefault((opened.name, request.mode == "clusters", request.beam_width, widths), []).append(number)
    answers: dict[int, Found] = {}

    def ended_early(number: int, hits: list, levels: int) -> None:
        answers[number] = Found(hits[: requests[number].request.k], levels)
        early(number, answers[number])

    for (_, clusters, beam_width, _), numbers in groups.items():
        opened, mine = requests[numbers[0]].opened, [requests[number].request for number in numbers]
        if clusters:
            found = [_clusters(requests[number]) for number in numbers]
        else:
            soft = [requests[number].soft for number in numbers]
            listen = lambda at, hits, levels, numbers=numbers: ended_early(numbers[at], hits, levels)  # noqa: E731
            hits_of = opened.retriever.retrieve(
                [one.query for one in mine], k=max(one.k for one in mine), filters=[one.filter for one in mine],
                beam_width=beam_width, soft=Soft(soft, listen) if any(soft) else None,
                users=[requests[number].user for number in numbers],
            )  # fmt: skip
            found = [Found(hits[: one.k]) for one, hits in zip(mine, hits_of)]
        answers = dict(zip(numbers, found)) | answers
    return [answers[number] for number in range(len(requests))]


def _level_of_clusters(retriever: Retriever) -> int:
    """At which the release's search ends or, where that is the last one, the level above products."""
    return max(1, min(retriever.levels, retriever.trie.levels - 1))


def _clusters(asked: Asked) -> Found:
    (opened, request, soft), levels = asked, _level_of_clusters(asked.opened.retriever)
    retriever = opened.retriever
    widths = [max(width, request.k) for width in retriever.widths_for(request.k, request.beam_width)[:levels]]
    result = retriever.searched(
        [request.query], widths=widths, levels=levels, top_k=request.k, allowed=retriever.compile(request.filter),
        at_level=None if soft is None else lambda *_: time.monotonic() >= soft, users=[asked.user],
    )  # fmt: skip
    count, clusters, reached = int(result.count_B[0]), [], result.docid_BKL.shape[-1]
    scores = (result.logp_BK if result.score_BK is None else result.score_BK)[0, :count].tolist()
    asks = retriever.lookahead is None or retriever.lookahead.logp_weight != 0
    for codes, logp, score in zip(result.docid_BKL[0, :count].tolist(), result.logp_BK[0, :count].tolist(), scores):
        clusters.append(_cluster(retriever, codes, score=score, logp=logp if asks else None))
    return Found(clusters, reached if reached < levels else None)


def _cluster(retriever: Retriever, codes: list[int], **scores) -> Cluster:
    live = retriever.live
    return Cluster(prefix=retriever.space.text(codes), products=below(live, live.view, tuple(codes)).products, **scores)


def answer_of(opened: Opened, request: RetrieveRequest, found: Found) -> Answer:
    """`found`: what `search` gave for this request of one query."""
    retriever, fewer, clusters = opened.retriever, None, None
    hurried = {}
    if found.levels is not None:
        hurried = {"degraded": Degraded(reason="soft_timeout"), "coverage": found.levels / retriever.trie.levels}
    if request.mode == "clusters":
        return Answer(products=[], clusters=found.hits, fewer=None, **hurried)
    if len(found.hits) < request.k:
        fewer = retriever.why_fewer(len(found.hits), k=request.k, expression=request.filter)
    said: list[Explain | None] = [None] * len(found.hits)
    if request.explains:
        user = Asked(opened, request).user
        whole = explained(retriever, request.query, found.hits, expression=request.filter, user=user)
        said = [Explain(levels=[Level(**vars(level)) for level in one.levels], terms=one.terms) for one in whole]
    if request.mode == "everything":
        clusters = _clusters_above(retriever, found.hits, said)
    products = [
        Product.of(hit, category_path=_category(retriever, hit), explain=one) for hit, one in zip(found.hits, said)
    ]
    return Answer(products=products, clusters=clusters, fewer=fewer, **hurried)


def _clusters_above(retriever: Retriever, hits: list[Hit], said: list[Explain]) -> list[Cluster]:
    """The clusters below which these products were found, in the order of their best products; a product that has gone meanwhile
    has none."""
    level, clusters = _level_of_clusters(retriever), {}
    for hit, one in zip(hits, said):
        codes = retriever.space.parse(hit.docid_text)[:level]
        if len(one.levels) >= level and codes not in clusters:
            at = one.levels[level - 1]
            clusters[codes] = _cluster(retriever, list(codes), score=at.score, logp=at.logp)
    return list(clusters.values())


def _category(retriever: Retriever, hit: Hit) -> list[str] | None:
    """A product of the release keeps its row; one that came since may have another by now, or none."""
    if hit.row < retriever.trie.rows:
        return category_of(retriever.live.view, hit.row)
    try:
        view, row = _standing(retriever, hit.product_id)
    except InputError:
        return None
    return category_of(view, row)


def _standing(retriever: Retriever, product_id: str) -> tuple[LiveView, int]:
    """A state of the products, and the row that the id means in it. Raises InputError for an id that means none."""
    while True:
        row, view = retriever.live.row(product_id), retriever.live.view
        if row < view.rows and view.products.name(row) == product_id:  # else rows were numbered anew in between
            return view, row


def product_of(opened: Opened, product_id: str) -> ProductResponse:
    """Raises Unserved (404) for a product that neither the release nor a change to it has."""
    retriever = opened.retriever
    try:
        view, row = _standing(retriever, product_id)
    except InputError as error:
        raise Unserved(404, str(error)) from None
    return ProductResponse(
        release=opened.name, product_id=product_id, docid=retriever.space.text(codes_of(view, [row])[0]),
        title=view.products.title(row), category_path=category_of(view, row),
        columns={} if view.filters is None else dict(sorted(_as_json(view.filters.values_of(row)).items())),
        live=bool(view.is_live([row])[0]),
    )  # fmt: skip


def _as_json(values: dict) -> dict:
    """Numbers that are not finite become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def below_of(opened: Opened, prefix: str) -> BelowResponse:
    """Raises InputError for what begins no ID."""
    retriever, view = opened.retriever, opened.retriever.live.view
    codes, space = retriever.space.parse_prefix(prefix), retriever.space
    seen = below(retriever.live, view, codes)
    tokens = [(space.text((*codes, code))[len(prefix) :], number) for code, number in seen.next_codes]
    members = zip(seen.rows, codes_of(view, seen.rows))
    names = view.products
    return BelowResponse(
        release=opened.name, prefix=prefix, count=seen.products,
        next_codes=[NextCode(token=token, products=number) for token, number in tokens],
        categories=[Category(path=path, products=number) for path, number in seen.categories],
        words=[Word(word=word, products=number) for word, number in top_words(view, codes)],
        products=[
            Member(product_id=names.name(row), docid=space.text(codes_L), title=names.title(row))
            for row, codes_L in members
        ],
    )  # fmt: skip
