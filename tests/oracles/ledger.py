"""The ledger as a dictionary, one product at a time: {product_id: (codes, status, since, cost)}."""


def first(release, number):
    """`release`: {product_id: (codes, cost)}."""
    return {product_id: (codes, "new", number, cost) for product_id, (codes, cost) in release.items()}


def advance(previous, release, number):
    ledger = {}
    for product_id, (codes, cost) in release.items():
        if product_id not in previous:
            ledger[product_id] = (codes, "new", number, cost)
            continue
        codes_before, status_before, since_before, _ = previous[product_id]
        if status_before == "retired":
            ledger[product_id] = (codes, "kept" if codes == codes_before else "new", number, cost)
        elif codes == codes_before:
            ledger[product_id] = (codes, "kept", since_before, cost)
        else:
            ledger[product_id] = (codes, "moved", number, cost)
    for product_id, (codes, status, since, cost) in previous.items():
        if product_id not in release:
            ledger[product_id] = (codes, "retired", since if status == "retired" else number, cost)
    return ledger


def reserved(row, number, quarantine):
    _, status, since, _ = row
    return status != "retired" or number - since < quarantine


def occupied(ledger, number, quarantine):
    return sorted({row[0] for row in ledger.values() if reserved(row, number, quarantine)})


def withheld(ledger, product_ids, number, quarantine):
    found = set()
    for product_id, (codes, status, since, _) in ledger.items():
        gone_since = since if status == "retired" else number
        if product_id not in product_ids and number - gone_since < quarantine:
            found.add(codes)
    return sorted(found)


def held(ledger, product_ids, number, quarantine):
    """[codes or None], one for each product_id."""
    return [
        ledger[product_id][0] if product_id in ledger and reserved(ledger[product_id], number, quarantine) else None
        for product_id in product_ids
    ]
