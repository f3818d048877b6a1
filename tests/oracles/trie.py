"""A trie as one dictionary per depth, filled by walking every ID code by code.

Answers in terms of prefixes (tuples of codes), so that node numbers of the fast trie are checked and not repeated.
"""


class DictTrie:
    def __init__(self, codes):
        """`codes`: one sequence of L codes per product; equal IDs may occur."""
        self.ids = [tuple(int(c) for c in row) for row in codes]
        self.order = sorted(range(len(self.ids)), key=lambda row: self.ids[row])
        self.levels = len(self.ids[0])
        self.children = {}
        for docid in self.ids:
            for depth in range(self.levels):
                self.children.setdefault(docid[:depth], set()).add(docid[depth])

    def prefixes(self, depth):
        """All prefixes of `depth` codes that some product has, in ID order."""
        return sorted({docid[:depth] for docid in self.ids})

    def item_range(self, prefix):
        """First row and end of the rows under `prefix`, counting products one by one."""
        prefix = tuple(prefix)
        before = sum(docid[: len(prefix)] < prefix for docid in self.ids)
        return before, before + sum(docid[: len(prefix)] == prefix for docid in self.ids)


def starts_of(sizes):
    """Where ranges of these sizes begin, one after the other, and where the last ends."""
    return [sum(sizes[:number]) for number in range(len(sizes) + 1)]
