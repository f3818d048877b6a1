"""Batches out of one pass after another over the same rows, drawn one row at a time from a deck of cards."""


def deal(passes: list[list[int]], batch: int, batches: int) -> list[list[int]]:
    """Each batch takes from the top of the deck the first `batch` rows that it has not yet; passed-over rows stay on top.

    passes    the rows in the order of each pass; the next is laid under the deck when the deck has too few rows
    """
    deck, waiting, dealt = [], list(passes), []
    for _ in range(batches):
        hand = []
        while len(hand) < batch:
            row = next((row for row in deck if row not in hand), None)
            if row is None:
                deck += waiting.pop(0)
            else:
                deck.remove(row)
                hand.append(row)
        dealt.append(hand)
    return dealt


def faults(dealt: list[list[int]], rows: int) -> list[str]:
    """What is wrong with these batches of equal size: rows seen too rarely or too often, rows twice in one batch."""
    seen = [0] * rows
    found = []
    for number, hand in enumerate(dealt):
        if len(set(hand)) < len(hand):
            found.append(f"batch {number} holds a row twice")
        for row in hand:
            seen[row] += 1
    total = sum(map(len, dealt))
    least, most = total // rows, -(-total // rows)
    return found + [f"row {row} was seen {n} times" for row, n in enumerate(seen) if not least <= n <= most]
