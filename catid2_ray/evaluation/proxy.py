"""A small, fast generator over any kind of IDs, which shows what queries find through them: `compare-ids --score recall`.

A perceptron from a query's vector to ID tokens, the same for every kind, trained for seconds on one core and searched by the
package's own beam. Its recall says which kind of IDs finds more; a real generator, which reads words and learns for hours,
finds more by every kind. Unusual: it reads codewords that it makes itself, the mean of what the levels above leave of the
products' vectors, so trees, numbers and learned codebooks are read alike.

N products, Q queries, P pairs, D vector, L levels, K codes of a level, H hidden; B batch, M beams.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import continuations
from catid2_ray.schedule import learning_rate_at, seed_from

# On IDs by residual k-means of 54,667 Home Depot titles recall@50 on test is .322; 4 epochs .303, of twice the width at 1e-3 .272.
HIDDEN, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 8, 512, 4e-3, 1e-2
WIDTH = 100  # of the beam, and how many products a query is given
_SEARCHED = 32  # queries of one search


class Questions(NamedTuple):
    """What the proxy learns from, or is asked: a vector a query, and of each pair its query and its product, both by row."""

    query_QD: np.ndarray
    query_P: np.ndarray
    product_P: np.ndarray


def codewords(vector_ND: np.ndarray, codes_NL: np.ndarray, codes_per_level: Sequence[int]) -> list[np.ndarray]:
    """One K_l×D per level: the mean, over the products with that code, of vector minus the codewords above; 0 where there are
    none. Where the codes are those of residual k-means, these are its centres."""
    rest_ND, books = np.array(vector_ND, np.float32), []
    for level, codes in enumerate(codes_per_level):
        code_N = codes_NL[:, level]
        sum_KD = np.zeros((codes, rest_ND.shape[1]), np.float32)
        np.add.at(sum_KD, code_N, rest_ND)
        books.append(sum_KD / np.maximum(np.bincount(code_N, minlength=codes), 1)[:, None].astype(np.float32))
        rest_ND -= books[-1][code_N]
    return books


class ProxyGenerator(nn.Module):
    """log P(c_l | q, c_1 … c_{l−1}): per level one hidden layer over the query's vector and the sum of the prefix's codewords.

    A `retrieval.decoders.Decoder` whose `memory` is the queries' vectors, B×D.
    """

    def __init__(self, books: Sequence[np.ndarray], *, hidden: int = HIDDEN):
        super().__init__()
        self.codes_per_level, width = tuple(len(book_KD) for book_KD in books), books[0].shape[1]
        for level, book_KD in enumerate(books):
            self.register_buffer(f"book_{level}", torch.from_numpy(book_KD))
        self.of_query = nn.ModuleList(nn.Linear(width, hidden) for _ in books)
        self.of_prefix = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in books)
        self.to_codes = nn.ModuleList(nn.Linear(hidden, codes) for codes in self.codes_per_level)
        self.device = torch.device("cpu")

    def prefix_sum(self, prefix_BMl: Tensor) -> Tensor:
        """B×M×D, the codewords of the levels so far added up."""
        total_BMD = self.book_0.new_zeros(*prefix_BMl.shape[:-1], self.book_0.shape[1])
        for level in range(prefix_BMl.shape[-1]):
            total_BMD = total_BMD + getattr(self, f"book_{level}")[prefix_BMl[..., level]]
        return total_BMD

    def scores(self, level: int, query_BD: Tensor, prefix_BMl: Tensor) -> Tensor:
        """B×M×K."""
        hidden_BMH = self.of_query[level](query_BD)[:, None]
        if level:
            hidden_BMH = hidden_BMH + self.of_prefix[level](self.prefix_sum(prefix_BMl))
        return self.to_codes[level](functional.gelu(hidden_BMH))

    def loss(self, query_BD: Tensor, codes_BL: Tensor, trie: Trie | None = None) -> Tensor:
        """Σ_l −log P(c_l | q, c_1 … c_{l−1}), mean over the batch (eq. 9 of CAT-ID²); with `trie`, P over the codes that its IDs
        have after these."""
        score_LBK = [
            self.scores(level, query_BD, codes_BL[:, None, :level])[:, 0] for level in range(len(self.codes_per_level))
        ]
        if trie is not None:
            score_LBK = [
                score_BK.masked_fill(~valid_BK, -torch.inf)
                for score_BK, valid_BK in zip(score_LBK, continuations(trie, codes_BL))
            ]
        return sum(
            functional.cross_entropy(score_BK, code_B) for score_BK, code_B in zip(score_LBK, codes_BL.unbind(1))
        )

    # What the beam search asks of a decoder.
    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        raise InputError("a proxy generator reads vectors: give them to the search as `memory`")

    def decode_step(self, level: int, memory: Tensor, cache, parent_BM: Tensor, code_BM: Tensor):
        return memory, None

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        return self.scores(level, hidden_BMD, prefix_BML)


def train(
    vector_ND: np.ndarray, codes_NL: np.ndarray, codes_per_level: Sequence[int], questions: Questions, *, seed: int,
    epochs: int = EPOCHS, draws: Callable[[int], np.ndarray] | None = None, trie: Trie | None = None,
) -> ProxyGenerator:  # fmt: skip
    """A generator of these IDs: every pair and, as a query that asks for itself, every product's own vector once an epoch.

    `draws(epoch)`: int64, other products for the epoch to ask for, one for each pair and then each product; None: their own.
    `trie`: of these IDs, where the loss compares its continuations alone. AdamW, 5 % warm-up, cosine; a pure function of its
    arguments on one kind of machine. Raises InputError for no rows.
    """
    if not len(vector_ND):
        raise InputError("a proxy generator needs products, found none")
    books = codewords(vector_ND, codes_NL, codes_per_level)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ProxyGenerator(books)
    source_ED = torch.from_numpy(np.concatenate([questions.query_QD, vector_ND]).astype(np.float32))
    row_E = torch.from_numpy(np.concatenate([questions.query_P, len(questions.query_QD) + np.arange(len(vector_ND))]))
    product_E = torch.from_numpy(np.concatenate([questions.product_P, np.arange(len(vector_ND))]))
    codes_NL = torch.from_numpy(np.ascontiguousarray(codes_NL, np.int64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = min(BATCH, len(row_E))
    steps = len(row_E) // batch
    for epoch in range(epochs):
        order_E = torch.randperm(len(row_E), generator=torch.Generator().manual_seed(seed_from(seed, epoch)))
        if draws is not None:
            product_E = torch.from_numpy(draws(epoch))
        for step, some_B in enumerate(order_E[: steps * batch].split(batch)):
            rate = learning_rate_at(epoch * steps + step, epochs * steps, peak=LEARNING_RATE, warmup_share=0.05)
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = model.loss(source_ED[row_E[some_B]], codes_NL[product_E[some_B]], trie)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return model.eval()


def searched(
    model: ProxyGenerator, trie: Trie, query_QD: np.ndarray, *, width: int = WIDTH, normalize: str = "level"
) -> Iterator[np.ndarray]:
    """Of each query what a beam of `width` finds, best first: int64 width×2, first and last + 1 of the trie's rows of each ID.
    `normalize`: as the search takes it."""
    for ranges_K2, _ in found(model, trie, query_QD, width=width, normalize=normalize):
        yield ranges_K2


def found(
    model: ProxyGenerator, trie: Trie, query_QD: np.ndarray, *, width: int = WIDTH, normalize: str = "level",
    levels: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """As `searched`, with log P of each ID, float32, or of each prefix of `levels` codes; −inf where there are no more."""
    for start in range(0, len(query_QD), _SEARCHED):
        memory_BD = torch.from_numpy(np.ascontiguousarray(query_QD[start : start + _SEARCHED], np.float32))
        ones_B1 = torch.ones(len(memory_BD), 1, dtype=torch.long)
        result = constrained_beam_search(
            model,
            trie,
            ones_B1,
            ones_B1,
            beam_width=width,
            top_k=width,
            memory=memory_BD,
            normalize=normalize,
            levels=levels,
        )
        yield from zip(result.row_range_BK2.numpy(), result.logp_BK.numpy())


def ranked(
    model: ProxyGenerator, trie: Trie, query_QD: np.ndarray, *, width: int = WIDTH, normalize: str = "level"
) -> np.ndarray:
    """int64 Q×width: the products that a beam of `width` finds, best first, by their row; −1 beyond the last. Products that
    share an ID follow each other in the order of their rows. `normalize`: as the search takes it."""
    order_N, found_QW = trie.order_N, np.full((len(query_QD), width), -1, np.int64)
    for query, ranges_K2 in enumerate(searched(model, trie, query_QD, width=width, normalize=normalize)):
        rows = np.concatenate([np.arange(first, last) for first, last in ranges_K2])[:width].astype(np.int64)
        found_QW[query, : len(rows)] = order_N[rows]
    return found_QW


def recall_of(found_QW: np.ndarray, questions: Questions, ks: Sequence[int]) -> np.ndarray:
    """float64 Q×len(ks): the share of each query's products among its first k; NaN for a query without any (`metrics.recalls`)."""
    wanted_Q = np.bincount(questions.query_P, minlength=len(found_QW))
    hit_PW = found_QW[questions.query_P] == questions.product_P[:, None]
    recall_QK = np.full((len(found_QW), len(ks)), np.nan)
    for column, k in enumerate(ks):
        hits_Q = np.bincount(questions.query_P, weights=hit_PW[:, :k].any(1), minlength=len(found_QW))
        recall_QK[:, column] = np.divide(hits_Q, wanted_Q, out=np.full(len(found_QW), np.nan), where=wanted_Q > 0)
    return recall_QK


class Scored(NamedTuple):
    """`recall_QK` as `recall_of` gives it, and how long the generator trained and searched."""

    recall_QK: np.ndarray
    seconds: float


def score(
    vector_ND: np.ndarray, codes_NL: np.ndarray, codes_per_level: Sequence[int], *, learn: Questions, ask: Questions,
    ks: Sequence[int], seed: int, epochs: int = EPOCHS,
) -> Scored:  # fmt: skip
    """Train on `learn`, search for `ask`."""
    start = time.monotonic()
    model = train(vector_ND, codes_NL, codes_per_level, learn, seed=seed, epochs=epochs)
    trie = Trie.build(codes_NL, codes_per_level=codes_per_level, shared=True)
    found_QW = ranked(model, trie, ask.query_QD, width=max(ks))
    return Scored(recall_of(found_QW, ask, ks), time.monotonic() - start)
