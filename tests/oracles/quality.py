"""ID quality counted product by product and pair by pair: slow, and obviously what the definitions say."""

import math
from collections import Counter


def common_prefix(first, second):
    length = 0
    for a, b in zip(first, second):
        if a != b:
            break
        length += 1
    return length


def prefix_agreement(codes, categories, depth):
    """(within, across): means over every pair of different products that have a category at `depth`."""
    sums = {True: [], False: []}
    for i in range(len(codes)):
        for j in range(len(codes)):
            if i != j and categories[i][depth] >= 0 and categories[j][depth] >= 0:
                same = categories[i][depth] == categories[j][depth]
                sums[same].append(common_prefix(codes[i], codes[j]))
    return tuple(sum(sums[key]) / len(sums[key]) if sums[key] else None for key in (True, False))


def neighbour_agreement(codes, embeddings, neighbours):
    """Share of the nearest by cosine, over all products as queries, that agree on the first 1, 2, 3 tokens."""

    def cosine(a, b):
        norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b)) / norm if norm else 0.0

    agreeing, asked = [0] * min(3, len(codes[0])), 0
    for i in range(len(codes)):
        others = sorted((j for j in range(len(codes)) if j != i), key=lambda j: -cosine(embeddings[i], embeddings[j]))
        for j in others[:neighbours]:
            asked += 1
            for length in range(1, len(agreeing) + 1):
                agreeing[length - 1] += common_prefix(codes[i], codes[j]) >= length
    return [count / asked for count in agreeing]


def equal_rows(embeddings):
    """(collision rate, shared rate) when equal rows get equal IDs and others do not."""
    counts = Counter(tuple(row) for row in embeddings)
    shared = 0
    for row in embeddings:
        shared += counts[tuple(row)] > 1
    return (len(embeddings) - len(counts)) / len(embeddings), shared / len(embeddings)


def gini(counts):
    """Mean difference of two counts, over twice their mean: over every pair, a count with itself included."""
    total = sum(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * total)


def entropy(values):
    """In nats, of how often each value occurs."""
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


def purity(codes, categories, depth):
    """(purity, products) of the prefixes of depth + 1 tokens."""
    groups = {}
    for row, path in zip(codes, categories):
        if path[depth] >= 0:
            groups.setdefault(tuple(row[: depth + 1]), Counter())[path[depth]] += 1
    products = sum(sum(group.values()) for group in groups.values())
    return sum(max(group.values()) for group in groups.values()) / products, products


def adjusted_mutual_information(first, second):
    """(MI − E[MI]) / (mean entropy − E[MI]); E[MI] over all ways to permute the labels (Vinh et al. 2010, eq. 24a)."""
    total, sizes_a, sizes_b = len(first), Counter(first), Counter(second)

    def entropy(sizes):
        return -sum(n / total * math.log(n / total) for n in sizes.values())

    information = 0.0
    for (a, b), n in Counter(zip(first, second)).items():
        information += n / total * math.log(total * n / (sizes_a[a] * sizes_b[b]))
    expected = 0.0
    for a in sizes_a.values():
        for b in sizes_b.values():
            for n in range(max(1, a + b - total), min(a, b) + 1):
                chance = math.comb(b, n) * math.comb(total - b, a - n) / math.comb(total, a)
                expected += chance * n / total * math.log(total * n / (a * b))
    return (information - expected) / ((entropy(sizes_a) + entropy(sizes_b)) / 2 - expected)


def reconstruction(true, decoded):
    """(mean squared distance, the same over the distance from the mean row, mean cosine)."""
    count, width = len(true), len(true[0])
    mean = [sum(row[d] for row in true) / count for d in range(width)]
    error = sum(sum((x - y) ** 2 for x, y in zip(a, b)) for a, b in zip(true, decoded)) / count
    spread = sum(sum((x - m) ** 2 for x, m in zip(a, mean)) for a in true) / count
    cosine = [sum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b)) for a, b in zip(true, decoded)]
    return error, error / spread, sum(cosine) / count


def word_scores(words, codes, code):
    """z of the log-odds of each word under a first code against elsewhere; prior = its count anywhere (Monroe 2008)."""
    scores = {}
    everything = [(word, row[0] == code) for title, row in zip(words, codes) for word in title]
    here_all, all_all = sum(here for _, here in everything), len(everything)
    for word in {word for word, here in everything if here}:
        prior = sum(other == word for other, _ in everything)
        here = sum(other == word and inside for other, inside in everything)
        there = prior - here
        odds_here = (here + prior) / (here_all + all_all - here - prior)
        odds_there = (there + prior) / (all_all - here_all + all_all - there - prior)
        scores[word] = math.log(odds_here / odds_there) / math.sqrt(1 / (here + prior) + 1 / (there + prior))
    return scores
