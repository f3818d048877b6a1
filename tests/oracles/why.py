"""The path of one ID through a beam, over plain lists of prefixes."""


def path_of(ids, score_of, widths, own):
    """Per level (candidates, rank or None, best, last kept). `score_of`: prefix → log P; `own`: the ID, a tuple of codes."""
    kept, levels = [()], []
    for level, width in enumerate(widths, 1):
        prefixes = {tuple(docid[:level]) for docid in ids if tuple(docid[: level - 1]) in kept}
        ordered = sorted(prefixes, key=lambda prefix: (-score_of(prefix), prefix))
        kept = ordered[:width]
        rank = ordered.index(own[:level]) + 1 if own[:level] in ordered else None
        levels.append((len(ordered), rank, score_of(ordered[0]), score_of(kept[-1])))
    return levels
