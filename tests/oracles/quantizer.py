"""Slow, obvious versions of the quantizer's losses and codes: plain loops over anchors in float64.

Unusual: no sorting, no blocks, no shared code with the fast version; every sum is written out.
"""

import math

import numpy as np


def cosine(a, b) -> float:
    norm_a, norm_b = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    return 0.0 if norm_a == 0 or norm_b == 0 else float(a @ b) / (norm_a * norm_b)


def residual_quantization(residual_LBZ, codeword_LBZ, *, commitment) -> float:
    total = 0.0
    for level in range(len(residual_LBZ)):
        for residual_Z, codeword_Z in zip(residual_LBZ[level], codeword_LBZ[level], strict=True):
            total += (1 + commitment) * float(((residual_Z - codeword_Z) ** 2).sum())
    return total / len(residual_LBZ[0])


def hierarchical_class(residual_BZ, category_BH, *, depth, temperature, negatives="siblings") -> float:
    rows, anchors = range(len(residual_BZ)), []
    for a in rows:
        if category_BH[a][depth] < 0:
            continue
        positives, others = [], []
        for j in rows:
            if j == a or category_BH[j][depth] < 0:
                continue
            similarity = cosine(residual_BZ[a], residual_BZ[j]) / temperature
            if category_BH[j][depth] == category_BH[a][depth]:
                positives.append(similarity)
            elif depth == 0 or negatives == "all" or category_BH[j][depth - 1] == category_BH[a][depth - 1]:
                others.append(similarity)
        if positives and others:
            against = sum(math.exp(s) for s in others)
            anchors.append(sum(-math.log(math.exp(s) / (math.exp(s) + against)) for s in positives) / len(positives))
    return sum(anchors) / len(anchors) if anchors else 0.0


def probability(residual_BZ, codebook_KZ, *, scale_temperature=1.0):
    rows = []
    for residual_Z in residual_BZ:
        weight_K = [math.exp(-float(((residual_Z - e) ** 2).sum()) / scale_temperature) for e in codebook_KZ]
        rows.append([w / sum(weight_K) for w in weight_K])
    return np.array(rows)


def cluster_scale(probability_BK) -> float:
    rows, codes = len(probability_BK), len(probability_BK[0])
    total = 0.0
    for k in range(codes):
        usage = max(sum(float(probability_BK[b][k]) for b in range(rows)) / rows, 1e-30)
        total += usage * math.log(usage * codes) + (1 / codes) * math.log(1 / (codes * usage))
    return total


def dispersion(reconstruction_BD, embedding_BD, *, temperature) -> float:
    total = 0.0
    for i in range(len(embedding_BD)):
        weights = [math.exp(cosine(reconstruction_BD[i], d_j) / temperature) for d_j in embedding_BD]
        total -= math.log(weights[i] / sum(weights))
    return total / len(embedding_BD)


def codes(latent_BZ, codebooks):
    """Codes B×L and last-level residuals B×Z, the lowest code among equals."""
    all_codes, residuals = [], []
    for latent_Z in latent_BZ:
        residual_Z, row = latent_Z, []
        for level, codebook_KZ in enumerate(codebooks):
            distances = [float(((residual_Z - e) ** 2).sum()) for e in codebook_KZ]
            row.append(distances.index(min(distances)))
            if level < len(codebooks) - 1:
                residual_Z = residual_Z - codebook_KZ[row[-1]]
        all_codes.append(row)
        residuals.append(residual_Z)
    return np.array(all_codes), np.array(residuals)


def hierarchical_anchors(category_BH, *, depth, negatives="siblings") -> int:
    """How many rows have at least one positive and one negative."""
    count = 0
    for a, own in enumerate(category_BH):
        others = [row for j, row in enumerate(category_BH) if j != a and row[depth] >= 0]
        positives = [row for row in others if row[depth] == own[depth]]
        against = [row for row in others if row[depth] != own[depth]]
        if depth > 0 and negatives == "siblings":
            against = [row for row in against if row[depth - 1] == own[depth - 1]]
        count += own[depth] >= 0 and bool(positives) and bool(against)
    return count


def query_item(item_BZ, query_BZ, has_query_B, *, temperature) -> float:
    rows = [b for b in range(len(item_BZ)) if has_query_B[b]]
    total = 0.0
    for b in rows:
        own = math.exp(cosine(item_BZ[b], query_BZ[b]) / temperature)
        over_queries = sum(math.exp(cosine(item_BZ[b], query_BZ[j]) / temperature) for j in rows)
        over_items = sum(math.exp(cosine(item_BZ[j], query_BZ[b]) / temperature) for j in rows)
        total -= 0.5 * (math.log(own / over_queries) + math.log(own / over_items))
    return total / len(rows) if rows else 0.0
