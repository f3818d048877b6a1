"""Collision resolution by trying everything: one product, one prefix, one permutation at a time.

Overflow is replayed from the definition: before each move every product's offer is worked out anew.
"""

from collections import Counter
from itertools import permutations, product


def squared(a, b):
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b))


def add(*vectors):
    return [sum(float(v) for v in column) for column in zip(*vectors)]


def path(books, prefix):
    """Sum of the codewords that a prefix chooses."""
    return add([0.0] * len(books[0][0]), *(books[level][code] for level, code in enumerate(prefix)))


def latent(books, codes, residual):
    return add(residual, path(books, codes[:-1]))


def final_homes(codes, residual, books, product_ids, occupied):
    """Each row's prefix of L − 1 codes after overflow, and the prefixes whose last codes have to be assigned."""
    rows = sorted(range(len(codes)), key=lambda row: product_ids[row])
    full_ids = [tuple(row) for row in codes] + [tuple(row) for row in occupied]
    home = {row: tuple(codes[row][:-1]) for row in rows}
    touched = {docid[:-1] for docid, count in Counter(full_ids).items() if count > 1}
    taken = {tuple(docid) for docid in occupied}
    last = len(books[-1])
    homes = list(product(*(range(len(book)) for book in books[:-1])))

    def free(prefix):
        return [code for code in range(last) if (*prefix, code) not in taken]

    def room(node):
        """Free IDs under a prefix of any length, when every prefix holds at most what fits."""
        leaves = [leaf for leaf in homes if leaf[: len(node)] == node]
        return sum(max(0, len(free(leaf)) - sum(h == leaf for h in home.values())) for leaf in leaves)

    def offer(row):
        z, own = latent(books, codes[row], residual[row]), tuple(codes[row][:-1])
        for depth in range(len(books) - 2, -1, -1):
            node = own[:depth]
            if not room(node):
                continue
            while len(node) < len(books) - 1:
                rest = [a - b for a, b in zip(z, path(books, node))]
                children = [(*node, code) for code in range(len(books[len(node)])) if room((*node, code))]
                node = min(children, key=lambda child: (squared(rest, books[len(child) - 1][child[-1]]), child))
            rest = [a - b for a, b in zip(z, path(books, node))]
            there = min(squared(rest, books[-1][code]) for code in free(node))
            return there - squared(residual[row], books[-1][codes[row][-1]]), node
        raise AssertionError("no room anywhere")

    while True:
        members = Counter(home.values())
        overfull = {prefix for prefix, count in members.items() if count > len(free(prefix))}
        if not overfull:
            return [home[row] for row in range(len(codes))], touched
        offers = {row: offer(row) for row in rows if home[row] in overfull}
        leaving = min(offers, key=lambda row: (offers[row][0], product_ids[row]))
        home[leaving] = offers[leaving][1]
        touched.add(home[leaving])


def least_cost(prefix, points, book, occupied):
    """Least total squared distance of `points` to different free codes of `prefix`, over all permutations."""
    taken = {tuple(docid) for docid in occupied}
    free = [code for code in range(len(book)) if (*prefix, code) not in taken]
    table = [{code: squared(point, book[code]) for code in free} for point in points]
    return min(sum(row[code] for row, code in zip(table, chosen)) for chosen in permutations(free, len(points)))


def smallest_regions(ids, codes_per_level):
    """(depth, prefix) of the outermost of the smallest prefixes that hold what the overfull prefixes below them hold.

    `ids`: those of all products and all occupied IDs, as tuples.
    """

    def fits(node):
        size = 1
        for codes in codes_per_level[len(node) :]:
            size *= codes
        return sum(docid[: len(node)] == node for docid in ids) <= size

    regions = set()
    for home in {docid[:-1] for docid in ids}:
        node = home
        while not fits(node):
            node = node[:-1]
        if node != home:
            regions.add(node)
    return {node for node in regions if not any(node[:depth] in regions for depth in range(len(node)))}
