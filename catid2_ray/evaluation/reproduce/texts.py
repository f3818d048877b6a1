"""What the report says of each table: its title, and in a sentence or two the question that it answers; how it writes a time."""

PROXY_NOTE = (
    "Rows of IDs are found through the proxy of compare-ids --score recall: a small generator, the same for every kind, "
    "trained for seconds, whose beam of 100 IDs is the list. They compare kinds of IDs with each other, not a real generator "
    "with BM25; rows with a generator trained in full do that. GDR, in Table 2, is apart: the proxy finds clusters alone, and "
    "adapted vectors order their products, so its figure is not one of a kind of IDs."
)
SEARCH_ERROR = (
    "Is a product missed because the beam lost it, or because the model ranks it low? For a sample of validation queries the "
    "release's generator scored every ID: what exact scores find is the model's, what beams find less is the search's."
)
QUESTIONS = {
    "T2": "Which method finds most of what queries ask for? Each returns the same number of products.",
    "T3": "What does each term of the loss bring? Rows (0) to (6) as the paper prints them, and the same terms added "
    "to our preset.",
    "T4": "Does the category's text in the embedding help, or is the category known from the title anyway?",
    "T5": "Does a deeper category tree make better IDs, and do hard negatives?",
    "T6": "How many levels should an ID have?",
    "CQ": "What do the category as first code and the query–item term bring to IDs that products share, at equal beams and at "
    "equal products?",
    "F5": "How much do the weights of the loss and the size of the codebooks matter?",
    "CT": "Do categories make better IDs? Labels as they are, wrong on purpose, unknown, and none at all: a gain that comes from "
    "categories shrinks from row to row, and is gone where all labels are exchanged.",
    "1": "How large is this catalogue, and how much do judged queries say of it? Beside it the paper's three.",
    "7": "What does training cost? The paper's hours and ours, of which the IDs and the generator.",
    "8": "What do IDs look like? Products of one category by both kinds: where IDs follow categories, their first codes agree.",
}
TITLES = {
    "T2": "Table 2: methods", "T3": "Table 3: terms of the loss", "T4": "Table 4: category text in the embedding",
    "T5": "Table 5: depth of the categories, and negatives", "T6": "Table 6: levels of an ID",
    "CQ": "CQ-SID: IDs that products share", "CT": "What category labels bring",
    "F5": "Figure 5: weights of the loss and size of the codebooks",
    "1": "Table 1: the data", "7": "Table 7: training time", "8": "Table 8: IDs side by side",
}  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
