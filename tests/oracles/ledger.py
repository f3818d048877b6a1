"""The ledger as a dictionary, one product at a time: {product_id: (codes, status, since, until, cost)}."""


def first(release, number):
    """`release`: {product_id: (codes, cost)}."""
    return {product_id: (codes, "new", number, 0, cost) for product_id, (codes, cost) in release.items()}


def advance(previous, release, number, quarantine):
    ledger = {}
    previous = {product_id: row for product_id, row in previous.items() if reserved(row, number)}
    for product_id, (codes, cost) in release.items():
        if product_id not in previous:
            ledger[product_id] = (codes, "new", number, 0, cost)
            continue
        codes_before, status_before, since_before, _, _ = previous[product_id]
        if status_before == "retired":
            ledger[product_id] = (codes, "kept" if codes == codes_before else "new", number, 0, cost)
        elif codes == codes_before:
            ledger[product_id] = (codes, "kept", since_before, 0, cost)
        else:
            ledger[product_id] = (codes, "moved", number, 0, cost)
    for product_id, row in previous.items():
        if product_id not in release:
            codes, status, _, _, cost = row
            left_before = status == "retired"
            ledger[product_id] = row if left_before else (codes, "retired", number, number + quarantine, cost)
    return ledger


def reserved(row, number):
    _, status, _, until, _ = row
    return status != "retired" or number < until


def occupied(ledger, number):
    return sorted({row[0] for row in ledger.values() if reserved(row, number)})


def withheld(ledger, product_ids, number, quarantine):
    found = set()
    for product_id, (codes, status, _, until, _) in ledger.items():
        free = until if status == "retired" else number + quarantine
        if product_id not in product_ids and number < free:
            found.add(codes)
    return sorted(found)


def held(ledger, product_ids, number):
    """[codes or None], one for each product_id."""
    return [
        ledger[product_id][0] if product_id in ledger and reserved(ledger[product_id], number) else None
        for product_id in product_ids
    ]
