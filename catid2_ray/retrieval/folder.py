"""The folder that a replica reads, and what a retriever is made of from it.

    retriever.json    settings        generator/      a saved model with its tokenizer
    trie/             all IDs         products.arrow  product_id and title, rows in trie order, memory-mapped
and as the release has them
    node_vectors/ (for a search that looks ahead)
    product_names.npy  vectors/  value.npy  columns.arrow (for filters)  lexical/
    encoder/  adapter/ (read by who makes the query encoder)
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.errors import ArtifactError, InputError, ReleaseError
from catid2_ray.generator.saved import load_to_search
from catid2_ray.generator.users import Reading
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.lookahead import Lookahead
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import ProductNames, Products
from catid2_ray.retrieval.rescoring import Expansion
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

SETTINGS = "retriever.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settings_of(folder) -> dict:
    """What retriever.json says. Raises ArtifactError where the folder is no retriever's."""
    folder = Path(folder)
    missing = [name for name in (SETTINGS, "products.arrow", "generator", "trie") if not (folder / name).exists()]
    if missing:
        raise ArtifactError(f"{folder} is no retriever: {', '.join(missing)} missing; publish the release again")
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{folder} cannot be read ({type(error).__name__}: {error}); publish it again")


def opened(
    folder, *, device: str = "cpu", dtype: str = "float32", normalize: str | None = None, weights: str | None = None,
    encode_query=None, adapter=None,
) -> dict:  # fmt: skip
    """The arguments of a `Retriever`. `normalize` and `weights` win over what the release says; `dtype`: of the model.

    Raises ArtifactError for files that are missing or damaged, ReleaseError for parts of different releases and for scores that
    the generator was not taught, InputError for int8 weights on another device than the CPU.
    """
    folder, settings = Path(folder), settings_of(folder)
    weights = weights or settings.get("weights", "float32")
    if weights == "int8" and (device != "cpu" or dtype != "float32"):
        raise InputError(
            f"int8 weights are for CPUs and float32, found device {device} and dtype {dtype}; set weights=float32"
        )
    try:
        model, tokenizer = load_to_search(folder / "generator")
        codes_per_level = tuple(settings["codes_per_level"])
        products = _products(folder)
        normalize = _matched(normalize or settings.get("normalize", "level"), settings.get("loss", "level"))
        expansion = settings.get("expansion")
        expansion = None if expansion is None else Expansion(**expansion)
        ahead = settings["lookahead"] if settings.get("search") == "lookahead" else None
        ahead = None if ahead is None else Lookahead(**ahead)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, (ArtifactError, InputError, ReleaseError)):
            raise
        raise _unreadable(folder, error) from error
    trie = Trie.open(folder / "trie")
    if codes_per_level != tuple(trie.codes_per_level):
        raise ReleaseError(
            f"{folder}: {SETTINGS} has codes per level {list(codes_per_level)}, the trie "
            f"{list(trie.codes_per_level)}; take both from one release"
        )
    return {
        "model": model.eval().to(device, _DTYPES[dtype]),
        "tokenizer": tokenizer,
        "trie": trie,
        "products": products,
        "names": ProductNames.open(folder, products.product_ids) if (folder / "product_names.npy").exists() else None,
        "index": _index(folder, products, trie.rows),
        "beam_width": settings.get("beam_width", 100),
        "stop_level": settings.get("stop_level"),
        "expansion": expansion,
        "lookahead": ahead,
        "nodes": NodeVectors.open(folder / "node_vectors") if ahead and (folder / "node_vectors").exists() else None,
        "encode_query": encode_query,
        "adapter": adapter,
        "query_tokens": settings.get("query_tokens", 32),
        "reading": Reading(**settings["user"]) if settings.get("user") else None,
        "normalize": normalize,
        "weights": weights,
        "release": settings.get("release", ""),
    }


def _matched(normalize: str, loss: str) -> str:
    """`normalize`, where a generator of this loss was taught to mean it."""
    if (normalize == "trie") != (loss == "trie"):
        taught = "trie" if loss == "trie" else "level or vocabulary"
        raise ReleaseError(
            f"the release's generator was trained with loss {loss}, which is searched with normalize {taught}, found {normalize}: "
            f"leave normalize out, or train with generator.loss {'trie' if normalize == 'trie' else 'level'}"
        )
    return normalize


def _products(folder: Path) -> Products:
    table = pa.ipc.open_file(pa.memory_map(str(folder / "products.arrow"))).read_all()
    value = folder / "value.npy"
    return Products(
        table["product_id"],
        table["title"] if "title" in table.column_names else None,
        np.asarray(np.load(value, mmap_mode="r", allow_pickle=False)) if value.exists() else None,
        VectorStore.open(folder / "vectors") if (folder / "vectors").exists() else None,
        LexicalIndex.open(folder / "lexical") if (folder / "lexical").exists() else None,
    )


def _index(folder: Path, products: Products, rows: int) -> FilterIndex:
    path = folder / "columns.arrow"
    if not path.exists():
        return FilterIndex({"product_id": products.product_ids})
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if table.num_rows != rows:
        raise ReleaseError(f"{path} has {table.num_rows} rows, the trie {rows}; take both from one release")
    return FilterIndex(table.append_column("product_id", products.product_ids))
