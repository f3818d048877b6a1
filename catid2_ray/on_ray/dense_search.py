"""Dense retrieval as a baseline: every product's vector against the query's, exactly, in one process.

It holds the catalogue's vectors as float16 (2·D bytes a product) and scores them in blocks; equal scores stand in the
order of the product ids, so results repeat exactly.
"""

import numpy as np
import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import default_cache, fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.on_ray.arrays import matrix
from catid2_ray.on_ray.query_encoder import query_encoder as open_encoder

_BLOCK = 65_536  # products scored at a time


class DenseSearch:
    """Actor: queries in, their `k` nearest products by cosine out."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest], query_encoder: str | None, k: int):
        embeddings, self.k = parts["embeddings"], k
        made_by = Recipe.build(embeddings.recipe).embedding
        if parts["catalog"].metrics["width"] and not query_encoder:
            raise InputError(
                "dense search needs vectors for queries, but the catalogue's embeddings are given and no encoder is known: set "
                "serving.query_encoder, or leave dense out of the methods"
            )
        name, folder = query_encoder or made_by.encoder, None
        if name == "lsa":
            folder = fetch(store, embeddings, default_cache(), below=("encoder/",))
        self.encode = open_encoder(folder, {"name": name, "tokens": made_by.tokens})
        ids, blocks = [], []
        for entry in embeddings.parts():
            table = store.read_table(embeddings.file(entry["name"]), columns=["product_id", "embedding"])
            vector_ND = torch.from_numpy(np.array(matrix(table["embedding"]), np.float32))
            blocks.append(torch.nn.functional.normalize(vector_ND, dim=-1).half())
            ids += table["product_id"].to_pylist()
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.product_ids = [ids[i] for i in order]
        self.vector_ND = torch.cat(blocks)[torch.tensor(order)]

    def __call__(self, spec: dict) -> dict:
        query_BD = torch.nn.functional.normalize(torch.from_numpy(np.asarray(self.encode(spec["queries"]))), dim=-1)
        if query_BD.shape[1] != self.vector_ND.shape[1]:
            raise InputError(
                f"queries have vectors of width {query_BD.shape[1]}, products of {self.vector_ND.shape[1]}: set "
                "serving.query_encoder to the encoder that made the products' vectors"
            )
        score_BN = torch.cat([query_BD @ block.float().T for block in self.vector_ND.split(_BLOCK)], 1).numpy()
        return {"position": spec["position"], "ranked": [self._best(score_N) for score_N in score_BN]}

    def _best(self, score_N: np.ndarray) -> list[str]:
        k, at = min(self.k, len(score_N)), np.arange(len(score_N))
        if k < len(score_N):
            # All that tie with the last are kept, so that the cut does not depend on the partition's order.
            at = np.flatnonzero(score_N >= np.partition(score_N, len(score_N) - k)[len(score_N) - k])
        return [self.product_ids[i] for i in at[np.argsort(-score_N[at], kind="stable")][:k]]
