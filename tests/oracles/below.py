"""What lives below a prefix of an ID, counted product by product."""

from collections import Counter


def below(products, prefix, most: int = 10):
    """`products`: (codes, category path or None) of each live one. Returns their number, the next codes and the categories, each
    with its number of products, most products first."""
    inside = [(codes, path) for codes, path in products if tuple(codes[: len(prefix)]) == tuple(prefix)]
    following = Counter(int(codes[len(prefix)]) for codes, _ in inside if len(codes) > len(prefix))
    paths = Counter(tuple(path) for _, path in inside if path)
    first = sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    return len(inside), first, sorted(paths.values(), reverse=True)[:most], paths
