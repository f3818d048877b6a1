"""Recall at k counted by hand, one query and one product at a time."""


def recall_at(ranked, relevant, k):
    per_query = []
    for products, wanted in zip(ranked, relevant):
        if len(wanted) == 0:
            continue
        found = 0
        for product in wanted:
            if product in products[:k]:
                found += 1
        per_query.append(found / len(wanted))
    return sum(per_query) / len(per_query)
