"""Stage 1b: name the codes of a newly trained quantizer after those of the release before, so that tokens keep their meaning.

The names are decided on a bounded sample of products that both catalogues have; everything later sees only the renamed
quantizer.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.identifiers.realign import realign
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages.assign.work import open_coder
from catid2_ray.on_ray.stages.catalog import read_vectors
from catid2_ray.quantizer.coder import encode

_OF_THE_RUN = ("seconds", "peak_memory_bytes")


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The quantizer with its codes renamed, and rename.json; as it was trained where there is nothing to align to."""
    trained, previous, recipe = parts["quantizer"], job.previous, job.recipe
    alike = previous and recipe.ids.realign and recipe.quantizer.ids == "unique" == previous.parts["ids"].metrics["ids"]
    if not alike or previous.parts["ids"].metrics["codes_per_level"] != list(recipe.quantizer.codes_per_level):
        return trained
    named = previous.parts["quantizer"]
    if trained.digest in (named.digest, named.parents.get("trained")):
        return named  # it is the quantizer of the release before, whose codes have their names
    parents, history = {"trained": trained, "embeddings": parts["embeddings"]}, {"previous": previous.parts["ids"]}
    parents |= {"adapter": parts["adapter"]} if "adapter" in parts else {}
    settings = {"rows": recipe.quantizer.kmeans_sample, "seed": recipe.seed, "encode_rows": recipe.ids.encode_rows}
    return job.produce(
        "quantizer", settings, parents, lambda attempt: _rename(job, attempt, parents | history), history=history
    )


def _rename(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, trained = job.recipe, parents["trained"]
    coder = open_coder(job.store, trained)
    sample = read_vectors(
        ProductVectors.of(job.store, parents), ["product_id", "embedding", "category"],
        rows=recipe.quantizer.kmeans_sample, seed=recipe.seed,
    )  # fmt: skip
    before_NL = _codes_before(job.store, parents["previous"], sample["product_id"].combine_chunks())
    common = np.flatnonzero(before_NL[:, 0] >= 0)
    sample = sample.take(pa.array(common))
    category_NH = torch.from_numpy(matrix(sample["category"]).astype(np.int64))
    embedding_ND = torch.from_numpy(matrix(sample["embedding"]).copy())
    codes_NL = encode(coder, embedding_ND, category_NH, rows=recipe.ids.encode_rows).codes_BL.numpy()
    naming = realign(before_NL[common], codes_NL, coder.codes_per_level)
    rename_LK, after_L = [rename_K.tolist() for rename_K in naming.rename_LK], naming.agreement_after_L.copy()
    if coder.category_column is not None:  # the first code is the category's own number
        rename_LK[0], after_L[0] = list(range(coder.codes_per_level[0])), naming.agreement_before_L[0]
    progress.event("realign", common=len(common), before=_rounded(naming.agreement_before_L), after=_rounded(after_L))
    with scratch.folder("quantizer") as folder:
        coder.renamed(rename_LK).save(folder)
        (folder / "rename.json").write_text(json.dumps(rename_LK))
        (folder / "history.json").write_bytes(job.store.read(trained.file("history.json")))
        figures = {name: value for name, value in trained.metrics.items() if name not in _OF_THE_RUN}
        figures |= {
            "seconds_training": trained.metrics["seconds"], "realigned_on": len(common),
            "agreement_before": naming.agreement_before_L.tolist(), "agreement_after": after_L.tolist(),
        }  # fmt: skip
        return attempt.commit(job.store.upload(folder, attempt.folder), metrics=figures)


def _rounded(share_L: np.ndarray) -> str:
    return ",".join(f"{share:.3f}" for share in share_L)


def _codes_before(store: Store, ids: Manifest, names: pa.Array) -> np.ndarray:
    """int64 N×L, the IDs that these products had, −1 where they had none; reads yesterday's IDs a part at a time."""
    codes_NL = np.full((len(names), len(ids.metrics["codes_per_level"])), -1, np.int64)
    for entry in ids.parts():
        table = store.read_table(ids.file(entry["name"]), columns=["product_id", "codes"])
        place_N = pc.index_in(names, value_set=table["product_id"].combine_chunks())
        here = np.flatnonzero(place_N.is_valid().to_numpy(zero_copy_only=False))
        codes_NL[here] = matrix(table["codes"])[place_N.drop_null().to_numpy()]
    return codes_NL
