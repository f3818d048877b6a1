"""The proxy generator's codewords and its search, one product at a time."""

import math

import numpy as np


def codewords(vector_ND, codes_NL, codes_per_level):
    """Level by level the mean of what is left of the products with a code."""
    left, books = [np.array(vector, float) for vector in vector_ND], []
    for level, codes in enumerate(codes_per_level):
        book = []
        for code in range(codes):
            members = [left[n] for n in range(len(left)) if codes_NL[n][level] == code]
            book.append(sum(members) / len(members) if members else np.zeros(len(vector_ND[0])))
        books.append(book)
        left = [left[n] - book[codes_NL[n][level]] for n in range(len(left))]
    return [np.array(book) for book in books]


def ranked(scores, codes_NL):
    """Products of one query, the likeliest first. `scores(level, prefix)`: a number per code of the level."""
    found = []
    for product, codes in enumerate(codes_NL):
        total = 0.0
        for level, code in enumerate(codes):
            logit_K = [float(s) for s in scores(level, list(codes[:level]))]
            total += logit_K[code] - math.log(sum(math.exp(s) for s in logit_K))
        found.append((-total, tuple(codes), product))
    return [product for _, _, product in sorted(found)]
