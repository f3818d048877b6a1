"""Named conditions: what each cell of the paper's tables measures, as a word, the family that runs it, a change of the recipe.

A condition that several tables show is measured once. What this software has no code for stands in its table with the reason, so
that nobody takes its absence for an oversight.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from catid2_ray.errors import InputError

Family = Literal["lexical", "dense", "fusion", "ids", "generator", "release", "run"]
NO_CHANGE: Mapping[str, object] = MappingProxyType({})


class Condition(NamedTuple):
    """`family`: what ranks products. `settings`: its own, such as k1 and b. `recipe`: changes of the recipe by dotted path.
    `kind`: of IDs. `seeded`: whether another seed gives another figure. `missing`: why nothing can measure it. `printed`: it gets
    the budget of kinds whose encoder begins at random."""

    name: str
    title: str
    family: Family = "ids"
    settings: Mapping[str, object] = NO_CHANGE
    recipe: Mapping[str, object] = NO_CHANGE
    kind: str | None = None
    seeded: bool = False
    missing: str | None = None
    printed: bool = False


class Row(NamedTuple):
    """A row of a table: its condition, and the paper's row beside it, if any."""

    condition: Condition
    paper: str | None = None


class Cell(NamedTuple):
    """`table`: T2 to T7, F5 for figure 5, CQ for CQ-SID's, CT for what labels bring; its name is TABLE/method/data set."""

    table: str
    row: Row
    data: str

    @property
    def name(self) -> str:
        return f"{self.table}/{self.row.condition.name}/{self.data}"


def _ids(name: str, title: str, kind: str | None = None, **more) -> Condition:
    kind = kind or name
    return Condition(name, title, kind=kind, seeded=True, printed=kind.endswith("_paper") or kind.startswith("paper_"),
                     **more)  # fmt: skip


def _same(codes: int, levels: int = 4) -> dict:
    return {"quantizer.codes_per_level": [codes] * levels}


# As it is, so not tuned; and a generator's head that reads the recipe's own encoder would not fit.
_AS_PUBLISHED = {"embedding.adapter": "none", "embedding.encoder_mode": "frozen", "generator.head": "plain"}


def _encoder(name: str, title: str, model: str) -> Condition:
    """A sentence encoder, by its id or folder, that nothing was tuned for."""
    return Condition(name, title, "dense", recipe={"embedding.encoder": model, **_AS_PUBLISHED})


LEXICAL = (
    Condition("bm25", "BM25, k1 1.2, b 0.75", "lexical"),
    Condition("bm25_tuned", "BM25, k1 and b chosen on validation", "lexical", {"tuned": True}),
    Condition("bm25_blanks", "BM25, words between blanks", "lexical", {"words": "blanks"}),
)
DENSE = (
    Condition("dense", "dense, the recipe's encoder, no adapter", "dense"),
    Condition("zero_shot", "dense, the encoder as it was published", "dense", recipe=_AS_PUBLISHED),
    Condition("adapted", "dense, adapted by two matrices", "dense", {"adapted": True}),
    Condition("hnsw", "adapted dense, HNSW graph (faiss)", "dense", {"adapted": True, "faiss": "hnsw"}),
    Condition("ivf", "adapted dense, inverted lists (faiss)", "dense", {"adapted": True, "faiss": "ivf"}),
    Condition("dpr", "DPR: the encoder fine-tuned, BM25 negatives", "dense", {"dpr": True}, seeded=True),
    _encoder("sentence_t5", "Sentence-T5 base as it is", "sentence-transformers/sentence-t5-base"),
    _encoder("mpnet", "Multilingual MPNet as it is", "sentence-transformers/paraphrase-multilingual-mpnet-base-v2"),
)
FUSION = tuple(
    Condition(f"bm25+{name}", f"BM25 + {title}, weight chosen on validation", "fusion", {"dense": name}, seeded=name == "dpr")
    for name, title in (("dense", "dense"), ("adapted", "adapted dense"), ("dpr", "DPR"))
)  # fmt: skip
KINDS = (
    _ids("dsi_naive", "DSI naive"),
    _ids("dsi_semantic", "DSI semantic"),
    _ids("hi_gen", "Hi-Gen"),
    _ids("nci", "NCI"),
    _ids("tiger", "TIGER"),
    _ids("paper_tiger", "TIGER, as printed, K 256", recipe=_same(256)),
    _ids("cat_id2_256", "CAT-ID², as printed, K 256", "cat_id2_paper", recipe=_same(256)),
    _ids("cat_id2_512", "CAT-ID², as printed, K 512", "cat_id2_paper", recipe=_same(512)),
    _ids("cat_id2", "CAT-ID², ours (the default)"),
    _ids("cat_id2_k512", "CAT-ID², ours, K 512", "cat_id2", recipe=_same(512)),
    _ids("cat_id2_shuffled", "CAT-ID² of shuffled categories (control)"),
    _ids("rq_kmeans", "residual k-means, nothing trained"),
    _ids("cq_sid", "CQ-SID, products share IDs"),
    _ids(
        "gdr", "GDR: clusters by a generator, their products by adapted dense", "rq_kmeans", settings={"clusters": True}
    ),
)
# Hours each, so they are measured where the recipe names them. Generator, budget and search are the recipe's, the IDs differ.
_TRAINED = ("dsi_semantic", "hi_gen", "nci", "tiger", "paper_tiger", "cat_id2_256", "cat_id2_512", "cat_id2", "cat_id2_k512",
            "cat_id2_shuffled", "cq_sid")  # fmt: skip
GENERATORS = (
    *(
        one._replace(name=f"{one.name}+generator", title=f"{one.title}: generator trained in full", family="generator")
        for one in KINDS
        if one.name in _TRAINED
    ),
    _ids("nci+pawa", "NCI: generator trained in full, its prefix-aware head", "nci", family="generator",
         recipe={"generator.head": "pawa"}),
)  # fmt: skip
RELEASE = (
    Condition(
        "generator", "the release's generator alone, beams of whole IDs", "release", {"served": False}, seeded=True
    ),
    Condition(
        "lookahead", "the release's look-ahead without words", "release", {"served": False, "ahead": True}, seeded=True
    ),
    Condition("served", "ours with everything on, as served", "release", {"served": True}, seeded=True),
)
MISSING = (
    Condition("pag", "PAG's look-ahead", missing="its simultaneous decoding is not built; `lookahead` looks ahead by node vectors"),
    Condition("genret", "GenRet", missing="it trains tokenizer and generator by turns, which stages that are "
        "committed once cannot"),
    Condition("chap", "CHAP", missing="its code and its IDs' construction could not be had"),
)  # fmt: skip

METHODS = (*LEXICAL, *DENSE, *FUSION, *KINDS, *GENERATORS, *RELEASE, *MISSING)
NAMES = tuple(condition.name for condition in METHODS)
USUAL = tuple(condition.name for condition in METHODS if condition not in GENERATORS)  # where a recipe names none
# Table 3: the printed rows, and the same on our preset, whose encoder begins as the identity.
PRINTED_3 = ("paper_tiger", "paper_hcc", "paper_csc", "paper_hcc_csc", "paper_dis", "paper_hcc_dis", "cat_id2_paper")
OURS_3 = ("tiger", "hcc", "csc", "hcc_csc", "dis", "cat_id2", "hcc_csc_dis")  # cat_id2 is row (5)
# What eqs. 4 and 5 leave open: the divisor |B| that is printed, and whether ‖r − e‖ is squared.
READINGS_3 = {
    "paper_batch": ("eq. 4 over the whole batch", {"quantizer.hierarchical_over": "batch"}),
    "paper_distance": ("eq. 5 of ‖r − e‖, not squared", {"quantizer.scale_distance": "plain"}),
}
_TERMS = ("TIGER", "(0) + HCCL", "(0) + CSCL", "(1) + CSCL", "(0) + DisL", "(1) + DisL", "all three")
SWEEPS = {
    "α": ("dispersion", (0.0, 0.01, 0.1, 1.0)),
    "β": ("hierarchical", (0.0, 0.003, 0.03, 0.3)),
    "γ": ("cluster_scale", (0.0, 0.1, 1.0)),
}
# Settings of a sweep that a kind has anyway: its run is found, not made again.
_KIND_OF = {("dispersion", 0.0): "hcc", ("hierarchical", 0.0): "dis", ("cluster_scale", 1.0): "hcc_csc_dis"}
SIZES = (64, 128, 256, 512)
# The paper's TIGER and CAT-ID² begin at random: our preset is another thing.
_PAPER_ROW = {"paper_tiger": "tiger", "tiger": None, "cat_id2": None}
TABLES = ("1", "2", "3", "4", "5", "6", "7", "8")
PAPER_LOCALES = ("us", "es", "jp")  # of ESCI, and what cells call the data
ALSO = ("F5", "CQ", "CT")  # figure 5, the table of CQ-SID, and that of what category labels bring
NOISE = (0.05, 0.2, 0.5)  # shares of products whose labels are exchanged; 1 is the control
WITH, WITHOUT = "with", "without"


def rows_of(
    table: str, methods: Sequence[str], *, text: Sequence[str] = ("title",), confidence: Mapping[str, float] = NO_CHANGE
) -> list[Row]:
    """The rows of a table that measures. `methods`: of table 2; `text`: the recipe's embedding.text, for table 4; `confidence`:
    its reproduce.confidence, for the table of category labels.

    Tables 7 and 8 show what tables 2 and the reports have; raises InputError for a table that measures nothing.
    """
    if table in ("2", "7"):
        return [Row(one, _paper_row(one)) for one in METHODS if one.name in methods]
    if table == "3":
        rows = [
            Row(_ids(kind, f"({number}) {term}, as printed"), str(number))
            for number, (kind, term) in enumerate(zip(PRINTED_3, _TERMS))
        ]
        rows += [Row(_ids(name, f"(6) with {title}, as printed", "cat_id2_paper", recipe=changes))
                 for name, (title, changes) in READINGS_3.items()]  # fmt: skip
        ours = zip(OURS_3, _TERMS)
        return rows + [Row(_ids(kind, f"({number}) {term}, our preset")) for number, (kind, term) in enumerate(ours)]
    if table == "4":
        return [
            Row(
                _ids(f"{kind}_{word}_category", f"{title}, {word} category text", kind, recipe=_text(text, word)),
                kind if word == WITH else f"{kind}_without",
            )
            for kind, title in (("dsi_semantic", "DSI semantic"), ("tiger", "TIGER"), ("cat_id2", "CAT-ID²"))
            for word in (WITH, WITHOUT)
        ]
    if table == "5":
        titles = {
            "tiger": "TIGER", "random_negatives": "3 levels, eq. 4 level by level, random negatives", "depth_1": "1 level",
            "depth_2": "2 levels", "depth_2_3": "2 and 3 levels",
        }  # fmt: skip
        rows = [Row(_ids(name, title), name) for name, title in titles.items()]
        return [*rows, Row(_ids("cat_id2", "3 levels"), "depth_3"),
                Row(_ids("on_residual", "3 levels, eq. 4 level by level, hard negatives"))]  # fmt: skip
    if table == "6":
        return [
            Row(_ids(f"{kind}_{levels}", f"{title}, {levels} levels", kind, recipe={"levels": levels}), f"{kind}_{levels}")
            for levels in (3, 4, 5)
            for kind, title in (("tiger", "TIGER"), ("cat_id2", "CAT-ID²"))
        ]  # fmt: skip
    if table == "CT":
        return _labels(confidence)
    if table in _MORE:
        return _MORE[table]()
    raise InputError(f"table {table!r} measures nothing of its own; those that do are 2, 3, 4, 5, 6, 7, F5, CQ and CT")


def _paper_row(method: Condition) -> str | None:
    """The paper's row of table 2 for a method; a generator trained in full stands beside its kind's."""
    base = method.name.split("+")[0] if method in GENERATORS else method.name
    return _PAPER_ROW.get(base, base)


def _shared_ids() -> list[Row]:
    """CQ-SID's table."""
    category, queries = {"quantizer.force_category": False}, {"quantizer.query_item": 0.0}
    changes = {
        "cq_rq_vae": ("RQ-VAE, products share IDs", category | queries),
        "cq_no_category": ("CQ-SID without category", category),
        "cq_no_query_item": ("CQ-SID without query–item term", queries),
    }
    rows = [Row(_ids(name, title, "cq_sid", recipe=change)) for name, (title, change) in changes.items()]
    return [*rows, Row(_ids("cq_sid", "CQ-SID")), Row(_ids("tiger", "TIGER, an ID each"))]


def _labels(confidence: Mapping[str, float]) -> list[Row]:
    """What category labels bring."""
    sure = _ids(
        "confident", "the labels of which the catalogue is sure", "cat_id2",
        recipe={"quantizer.category_confidence": dict(confidence)},
        missing=None if confidence else "reproduce.confidence names no column that says how sure a label is",
    )  # fmt: skip
    noise = [
        Row(_ids(f"noise_{100 * share:.0f}", f"labels of {share:.0%} of the products exchanged", "cat_id2",
                 recipe={"quantizer.category_noise": share}))
        for share in NOISE
    ]  # fmt: skip
    deep, shallow = (
        {"levels_beyond_categories": beyond, "quantizer.allow_deep_categories": True} for beyond in (0, -1)
    )
    return [
        Row(_ids("rq_kmeans", "no labels, nothing trained: residual k-means")),
        Row(_ids("tiger", "no labels: TIGER")),
        Row(_ids("dis", "no labels: DisL alone")),
        Row(_ids("cat_id2", "labels as they are")),
        Row(sure),
        Row(_ids("depth_2_3", "half of the deepest categories not known")),
        Row(
            _ids(
                "clusters",
                "no labels: clusters of vectors in their place",
                "cat_id2",
                recipe={"quantizer.category_from": "clusters"},
            )
        ),
        *noise,
        Row(_ids("cat_id2_shuffled", "all labels exchanged (the control)")),
        Row(_ids("on_residual", "eq. 4 by level, IDs deeper than categories (H < L)")),
        Row(_ids("as_deep", "eq. 4 by level, a level for each category (H = L)", "on_residual", recipe=deep)),
        Row(_ids("tiger_as_deep", "no labels, as many levels as categories: TIGER", "tiger", recipe=deep)),
        Row(_ids("shallow", "eq. 4 by level, a level fewer than categories (H > L)", "on_residual", recipe=shallow)),
    ]


def _sweeps() -> list[Row]:
    """Figure 5."""
    rows = [
        Row(_ids(f"{name}_{value:g}", f"{letter} = {value:g}", kind, recipe=changes))
        for letter, (name, values) in SWEEPS.items()
        for value in values
        for kind, changes in (_swept(name, value),)
    ]
    return rows + [
        Row(_ids(f"{kind}_k{codes}", f"{title}, K = {codes}", kind, recipe=_same(codes)))
        for codes in SIZES
        for kind, title in (("tiger", "TIGER"), ("cat_id2", "CAT-ID²"))
    ]


_MORE = {"CQ": _shared_ids, "F5": _sweeps}


def _swept(name: str, value: float) -> tuple[str, dict]:
    """The kind, and the change of the recipe that it needs."""
    if (name, value) in _KIND_OF:
        return _KIND_OF[name, value], {}
    return "cat_id2", {f"quantizer.{name}": value}


def _text(text: Sequence[str], word: str) -> dict:
    """embedding.text with or without the category path, which comes last."""
    bare = [field for field in text if field != "category_path"]
    return {"embedding.text": [*bare, "category_path"] if word == WITH else bare}


def plan(
    tables: Sequence[str], methods: Sequence[str], data: str, *, text: Sequence[str] = ("title",), runs: Sequence[str] = (),
    confidence: Mapping[str, float] = NO_CHANGE, encoders: Mapping[str, str] = NO_CHANGE, locale: str | None = None,
) -> list[Cell]:  # fmt: skip
    """The cells of these tables, in the order in which a person reads them. Figure 5 comes with table 6, to which its text belongs.
    `runs`: names of runs that other searches wrote, which stand first in table 2; `encoders`: further sentence encoders, name → id
    or folder, which stand last there or in the place of the one that is called so. `text`, `confidence`: as in `rows_of`. `locale`:
    of the paper, where the data are its own: tables 3 to 6 then have its K.

    Raises InputError for an unknown table or method, which it names, and for a run or an encoder that is called like a method.
    """
    _refuse(tables, methods, runs, encoders)
    measuring = [
        table for table in ("2", "3", "4", "5", "6", *ALSO) if table in tables or (table == "2" and "7" in tables)
    ]
    given = [Row(Condition(name, f"{name}, as given", "run", {"run": name})) for name in runs]
    named = {
        name: Row(_encoder(name, f"{name}: dense, as it was published", model), name)
        for name, model in encoders.items()
    }
    cells = []
    for table in measuring:
        rows = rows_of(table, methods, text=text, confidence=confidence)
        if table == "2":
            rows = [named.get(row.condition.name, row) for row in rows]
            rows = [*given, *rows, *(row for row in named.values() if row not in rows)]
        if table in ("3", "4", "5", "6") and locale:
            rows = [_of_printed_size(row) for row in rows]
        cells += [Cell(table if table in ALSO else f"T{table}", row, data) for row in rows]
    return cells


def _of_printed_size(row: Row) -> Row:
    """K 256, with which tables 3 to 6 of the paper were made, whatever the recipe has."""
    changes = {"quantizer.codes_per_level": [256] * 4, **row.condition.recipe}
    return row._replace(condition=row.condition._replace(recipe=changes))


def _refuse(tables: Sequence[str], methods: Sequence[str], runs: Sequence[str], encoders: Mapping[str, str]) -> None:
    replaceable = {"sentence_t5", "mpnet"}
    if taken := sorted({*runs} & {*NAMES, *encoders}):
        raise InputError(f"reproduce.runs: {', '.join(taken)} is a method's name; call the run otherwise")
    if taken := sorted({*encoders} & {*NAMES} - replaceable):
        raise InputError(f"reproduce.encoders: {', '.join(taken)} is a method's name; call the encoder otherwise")
    if unknown := [name for name in methods if name not in NAMES]:
        raise InputError(f"reproduce.methods: unknown {', '.join(map(repr, unknown))}; known are {', '.join(NAMES)}")
    if unknown := [table for table in tables if table not in (*TABLES, *ALSO)]:
        raise InputError(
            f"--tables: unknown {', '.join(unknown)}; choose from {', '.join(TABLES)}, F5 (figure 5), CQ (CQ-SID's) and CT (what "
            "category labels bring)"
        )


def chosen(cells: Sequence[Cell], name: str | None) -> list[Cell]:
    """All cells, or the one of this name; InputError names the nearest where there is none."""
    if name is None:
        return list(cells)
    found = [cell for cell in cells if cell.name == name]
    if not found:
        import difflib

        near = difflib.get_close_matches(name, [cell.name for cell in cells], n=3, cutoff=0.3)
        raise InputError(
            f"--cell {name!r}: there is no such cell; near it: {', '.join(near) or 'none'}; --list shows all"
        )
    return found
