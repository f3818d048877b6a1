"""The paired bootstrap one resample and one query at a time; it sees the queries that were drawn, never counts."""


def resampled_means(values, drawn):
    """`values`: a list of numbers per query; `drawn`: a list of query numbers per resample."""
    means = []
    for queries in drawn:
        sums = [0.0] * len(values[0])
        for query in queries:
            for column, value in enumerate(values[query]):
                sums[column] += value
        means.append([total / len(queries) for total in sums])
    return means


def quantile(numbers, share):
    """Linear between the two nearest of the sorted numbers."""
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
