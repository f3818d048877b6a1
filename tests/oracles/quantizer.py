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


def hierarchical_class(residual_BZ, category_BH, *, depth, temperature, negatives="siblings", over="anchors") -> float:
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
    return sum(anchors) / (len(anchors) if over == "anchors" else len(residual_BZ)) if anchors else 0.0


def shared_depth(first_H, second_H) -> int:
    """How many levels two paths have in common."""
    depth = 0
    while depth < len(first_H) and first_H[depth] == second_H[depth] >= 0:
        depth += 1
    return depth


def ancestor(latent_BZ, category_BH, *, decay, temperature) -> tuple[float, int]:
    """The soft contrast and its anchors."""
    labelled, anchors = [b for b in range(len(latent_BZ)) if category_BH[b][0] >= 0], []
    for a in labelled:
        own = sum(category >= 0 for category in category_BH[a])
        weight = {}
        for p in labelled:
            shared = shared_depth(category_BH[a], category_BH[p])
            if p != a and shared:
                weight[p] = 1.0 if shared == own else decay ** (own - shared)
        if sum(weight.values()) == 0:
            continue
        similarity = {j: cosine(latent_BZ[a], latent_BZ[j]) / temperature for j in labelled}
        total = math.log(sum(math.exp(s) for s in similarity.values()))
        anchors.append(sum(w * (total - similarity[p]) for p, w in weight.items()) / sum(weight.values()))
    return (sum(anchors) / len(anchors) if anchors else 0.0), len(anchors)


def category_rows(category_on, latent_BZ, residual_LBZ, codeword_LBZ, level):
    """What eq. 4 compares at a level."""
    if category_on == "prefix":
        return sum(codeword_LBZ[before] for before in range(level + 1))
    return residual_LBZ[level]


def residual_latents(model, embedding_BD):
    """z and the reconstruction of a residual encoder's own latents, one row at a time, from its weights as numbers."""

    def layers(module, row):
        for part in module:
            linear = hasattr(part, "weight")
            row = part.weight.detach().numpy() @ row + part.bias.detach().numpy() if linear else np.maximum(row, 0)
        return row

    basis_DZ = model.basis_DZ.numpy() if hasattr(model, "basis_DZ") else np.eye(model.width)
    latents, decoded = [], []
    for d in embedding_BD:
        z = basis_DZ.T @ d + layers(model.encoder, d)
        latents.append(z / math.sqrt(float(z @ z)))
        decoded.append(basis_DZ @ latents[-1] + layers(model.decoder, latents[-1]))
    return np.array(latents), np.array(decoded)


def probability(residual_BZ, codebook_KZ, *, scale_temperature=1.0, power=2):
    rows = []
    for residual_Z in residual_BZ:
        weight_K = [
            math.exp(-(float(((residual_Z - e) ** 2).sum()) ** (power / 2)) / scale_temperature) for e in codebook_KZ
        ]
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
