"""Between IDs and generator: the mean vector of the products below each node of the trie, which a search looks ahead by.

Workers bring the vectors of products to the order of the trie, as for a replica; this process then writes means range by
range. Left out, with a line that says so, where the recipe wants none or nothing can give queries vectors to compare.
"""

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.stages.lay_out import Needs, Rows, has_encoder
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

_VECTORS = Needs(vectors=True, value=False, columns=(), lexical=False)


def run(job: Job, parts: dict[str, Manifest]) -> Manifest | None:
    """The node_vectors artefact: node_vectors.json, depth_1.npy …, tail_….npy; None where there are to be none."""
    depth, reason = job.recipe.serving.node_depth, None
    if not depth:
        reason = "serving.node_depth is 0"
    elif not has_encoder(job.recipe, parts):
        reason = "the catalogue's embeddings are given and serving.query_encoder names no encoder for queries"
    if reason:
        progress.event("no_node_vectors", reason=repr(reason), search="beam")
        return None
    parents = STAGES["node_vectors"].reads(parts)
    settings = {"depth": min(depth, len(parts["ids"].metrics["codes_per_level"]))}
    return job.produce("node_vectors", settings, parents, lambda attempt: _make(job, attempt, parents))


def _make(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    store, depth = job.store, attempt.settings["depth"]
    with scratch.folder("node-vectors") as local:
        ids = fetch(store, parents["ids"], local / "cache", below=("trie/",))
        trie = Trie.open(ids / "trie")
        Rows.spread(job, attempt, parents, trie, _VECTORS).write(local / "rows", unit_vectors=True)
        folder = local / "made"
        made = NodeVectors.write(folder, trie, VectorStore.open(local / "rows" / "vectors"), depth=depth)
        figures = {"nodes": [len(mean_nD) for mean_nD in made.means], "width": made.width, "bytes": made.nbytes}
        files = store.upload(folder, attempt.folder)
    store.delete_folder(attempt.name("exchange"))
    progress.event("node_vectors", **figures)
    return attempt.commit(files, rows=parents["ids"].rows, metrics=figures)
