"""Every way of making IDs that the papers name, as one word in the recipe: `quantizer.kind` chooses a preset.

A preset fills the fields that *define* a kind, where the recipe does not set them itself; everything else (codes, widths,
epochs, batch) is a budget that all kinds share, so that a comparison is on equal terms.
"""

# The paper's encoder starts at random, and it names no such devices.
_PRINTED = {"encoder": "mlp", "refit": False, "revive_every_epochs": 0}
_TIGER = {"reconstruction": 1.0, "dispersion": 0.0, "hierarchical": 0.0, "cluster_scale": 0.0}
# No kind was shown to find more: benchmarks/results/ids.md.
_OURS = {
    "reconstruction": 1.0, "cluster_scale": 0.0, "hierarchical": 0.03, "category_on": "latent", "category_temperature": 0.2,
}  # fmt: skip
_TREE = {"coder": "tree"}

# kind: (kind that it varies, or None; fields that differ from the defaults, which are the printed values)
_VARIANTS: dict[str, tuple[str | None, dict]] = {
    "cat_id2": (None, _OURS),
    "cat_id2_paper": (None, _PRINTED),
    # the control for "the gain comes from categories": trained on permuted category paths
    "cat_id2_shuffled": ("cat_id2", {"category_noise": 1.0}),
    "tiger": (None, _TIGER),
    "cost": ("tiger", {"reconstruction": 0.0, "dispersion": 0.1}),
    # Table 3, rows (1)–(6), as added to our preset's base: cat_id2 itself is row (5): on unit vectors eq. 5's softmax is flat
    "hcc": ("cat_id2", {"dispersion": 0.0}),
    "csc": ("cat_id2", {"dispersion": 0.0, "hierarchical": 0.0, "cluster_scale": 1.0}),
    "hcc_csc": ("cat_id2", {"dispersion": 0.0, "cluster_scale": 1.0}),
    "dis": ("cat_id2", {"hierarchical": 0.0}),
    "hcc_dis": ("cat_id2", {}),
    "hcc_csc_dis": ("cat_id2", {"cluster_scale": 1.0}),
    # where the category term acts: cat_id2's is on the latent, at the leaf
    "ancestors": ("cat_id2", {"category_decay": 0.5}),
    "on_residual": ("cat_id2", {"category_on": "residual"}),
    "on_prefix": ("cat_id2", {"category_on": "prefix"}),
    "on_projection": ("cat_id2", {"category_on": "projection"}),
    # the same rows with the printed weights and devices; row (6) is cat_id2_paper
    "paper_tiger": (None, _TIGER | _PRINTED),
    "paper_hcc": ("paper_tiger", {"hierarchical": 1e-4}),
    "paper_csc": ("paper_tiger", {"cluster_scale": 1.0}),
    "paper_hcc_csc": ("paper_tiger", {"hierarchical": 1e-4, "cluster_scale": 1.0}),
    "paper_dis": ("paper_tiger", {"reconstruction": 0.0, "dispersion": 0.1}),
    "paper_hcc_dis": ("paper_dis", {"hierarchical": 1e-4}),
    # Table 5: depth of the categories, and random negatives, which the soft contrast has anyway
    "depth_1": ("cat_id2", {"category_depth": 1}),
    "depth_2": ("cat_id2", {"category_depth": 2}),
    "depth_2_3": ("cat_id2", {"category_depth": 3, "category_masked": 0.5}),
    "random_negatives": ("on_residual", {"negatives": "all"}),
    "rq_kmeans": (None, {"coder": "kmeans"}),
    "rq_kmeans_balanced": ("rq_kmeans", {"balanced": True}),
    "dsi_naive": (None, _TREE | {"branch": 0, "ids": "digits"}),
    "dsi_semantic": (None, _TREE | {"branch": 10, "leaf": 100, "ids": "suffix"}),
    "nci": (None, _TREE | {"branch": 30, "leaf": 30, "ids": "suffix"}),
    "hi_gen": (None, _TREE | {"branch": 10, "leaf": 100, "ids": "suffix", "tree_categories": True}),
    # CQ-SID (arXiv 2605.14434): first code = category, EMA codebooks, query–item term, clusters on purpose
    "cq_sid": (
        "tiger",
        {"commitment": 1.0, "force_category": True, "ema": 0.99, "query_item": 1e-3, "ids": "cluster", "refit": False},
    ),
}
KINDS = tuple(_VARIANTS)
# What a method *is*. A recipe's own value of these says something about its own kind, nothing about another.
DEFINING = frozenset(
    {"coder", "balanced", "tree_categories", "force_category", "ema", "query_item", "reconstruction", "dispersion",
     "hierarchical", "cluster_scale", "latent_radius", "level_power", "scale_temperature", "encoder", "category_on",
     "category_temperature", "category_decay", "hierarchical_over", "scale_distance"}
)  # fmt: skip


def preset(kind: str) -> dict:
    """The fields that make a kind, those of the kinds that it varies included."""
    base, fields = _VARIANTS[kind]
    return (preset(base) if base else {}) | fields


def lineage(kind: str) -> tuple[str, ...]:
    """The kind and those that it varies, nearest first."""
    base = _VARIANTS[kind][0]
    return (kind, *(lineage(base) if base else ()))


def as_kind(settings: dict, explicit: set[str], kind: str) -> dict:
    """The quantizer section for another kind: budgets and labels stay, what defines the kind is its preset's.

    `settings`: the section as a mapping; `explicit`: the fields in which it departs from its own kind's preset. They
    hold for the other kind too, unless that kind sets them itself, or they are DEFINING and it is no variant of the own.
    """
    own, line = settings.get("kind", "cat_id2"), lineage(kind)
    about = set(preset(kind)) | DEFINING
    if own in line:
        about = set().union(*(_VARIANTS[name][1] for name in line[: line.index(own)]))
    return {name: settings[name] for name in explicit - about - {"kind"}} | {"kind": kind}
