"""What a sample of a catalogue shows: types of columns, how category paths are written, HTML, language, grades of pairs.

Everything is a guess to be written down and corrected by a person; what then reads the tables guesses nothing (`columns.py`).
"""

import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

_HTML = r"<[A-Za-z/][^<>]{0,200}>|&[a-z]{2,8};|&#[0-9]+;"
_SEPARATORS = (" > ", ">", " » ", " / ", " | ", "|", "/", ";", "\\")
_WHOLE, _NUMBER = r"^[+-]?(0|[1-9][0-9]{0,17})$", r"^[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_LONGEST_NAME = 40  # characters that values of a filter have on average at most
# Other names of the columns that a catalogue needs, as shops have them.
OTHER_NAMES = {
    "product_id": ("id", "sku", "asin", "item_id", "product", "productid", "product_uid", "uid"),
    "title": ("name", "product_title", "product_name", "item_name", "label"),
    "description": ("product_description", "text", "body", "details"),
    "category_path": ("category", "categories", "product_type", "breadcrumb", "breadcrumbs", "taxonomy"),
    "query": ("search_term", "q", "keyword", "search_query", "query_text"),
    "relevance": ("grade", "label", "score", "rating", "clicks", "gain"),
    "split": ("set", "fold", "partition"),
    "query_id": ("qid", "search_id"),
}
_WORDS = {
    "English": "the and for with of in to a is", "German": "der die das und mit für von ist aus",
    "French": "le la les et pour avec de du des", "Spanish": "el la los y para con de del una",
    "Italian": "il la e per con di del della un", "Portuguese": "o a os e para com de do da",
}  # fmt: skip
_SCRIPTS = {
    "Japanese": r"[\p{Hiragana}\p{Katakana}]", "Chinese": r"\p{Han}", "Korean": r"\p{Hangul}", "Cyrillic": r"\p{Cyrillic}",
    "Arabic": r"\p{Arabic}", "Thai": r"\p{Thai}", "Greek": r"\p{Greek}", "Hebrew": r"\p{Hebrew}", "Devanagari": r"\p{Devanagari}",
}  # fmt: skip


def renaming(names: Sequence[str], missing: Sequence[str]) -> str:
    """Which columns the missing ones may be, as a sentence; "" where none looks like one."""
    plain = {name.lower(): name for name in names}
    likely = {
        want: next((plain[other] for other in OTHER_NAMES.get(want, ()) if other in plain), None) for want in missing
    }
    said = ", ".join(f"{name} to {want}" for want, name in likely.items() if name)
    return f"Rename {said}?" if said else ""


def filter_type(column: pa.ChunkedArray | pa.Array) -> tuple[str | None, str]:
    """(type as `catalog.filter_columns` names it, or None where it is nothing to filter by; why not)."""
    column, is_ = pc.drop_null(column), pa.types
    kind = column.type
    if is_.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not len(column):
        return None, "empty"
    if is_.is_list(kind) or is_.is_large_list(kind):
        return ("list<string>", "") if is_.is_string(kind.value_type) else (None, f"a list of {kind.value_type}")
    if not (
        is_.is_boolean(kind)
        or is_.is_integer(kind)
        or is_.is_floating(kind)
        or is_.is_string(kind)
        or is_.is_large_string(kind)
    ):
        return None, str(kind)
    different = pc.count_distinct(column).as_py()
    if different < 2:
        return None, "one value throughout"
    if is_.is_boolean(kind):
        return "bool", ""
    if is_.is_floating(kind):
        return "float", ""
    if is_.is_integer(kind):
        return _unless_a_name("int", different, len(column))
    return _of_texts(column.cast(pa.string()), different)


def _unless_a_name(kind: str, different: int, rows: int) -> tuple[str | None, str]:
    return (None, "a value of its own for every product") if different == rows > 50 else (kind, "")


def _of_texts(column, different: int) -> tuple[str | None, str]:
    if pc.all(pc.match_substring_regex(column, _WHOLE)).as_py():
        return _unless_a_name("int", different, len(column))
    if pc.all(pc.match_substring_regex(column, _NUMBER)).as_py():
        return "float", ""
    if set(pc.unique(pc.utf8_lower(column)).to_pylist()) <= {"true", "false"}:
        return "bool", ""
    if pc.all(pc.match_substring_regex(column, r"^\s*\[.*\]\s*$")).as_py():
        return "list<string>", ""
    if different > len(column) / 2:
        return None, "nearly every value differs"
    if pc.mean(pc.utf8_length(column)).as_py() > _LONGEST_NAME:
        return None, "long texts"
    return "string", ""


def separator_of(paths: pa.ChunkedArray | pa.Array) -> str:
    """What stands between two names of category paths that are texts: of the usual ones that which most paths have."""
    counts = {one: pc.sum(pc.match_substring(paths, one)).as_py() or 0 for one in _SEPARATORS}
    return max(_SEPARATORS, key=lambda one: (counts[one], len(one)))


def depth_of(paths: pa.ChunkedArray | pa.Array, separator: str | None) -> int:
    """Names of the deepest path."""
    lists = paths if separator is None else pc.split_pattern(pc.cast(paths, pa.string()), separator)
    return pc.max(pc.list_value_length(lists)).as_py() or 0


def html_share(texts: pa.ChunkedArray | pa.Array) -> float:
    """Share of the texts that hold a tag or an entity."""
    texts = pc.drop_null(texts)
    return (pc.sum(pc.match_substring_regex(texts, _HTML)).as_py() or 0) / len(texts) if len(texts) else 0.0


def language_of(texts: pa.ChunkedArray | pa.Array) -> str:
    """A sentence on scripts and the likeliest language in Latin script; "" where nothing can be said."""
    texts = pc.drop_null(texts)
    if not len(texts):
        return ""
    scripts = {
        name: (pc.sum(pc.match_substring_regex(texts, pattern)).as_py() or 0) for name, pattern in _SCRIPTS.items()
    }
    if scripts["Japanese"] > scripts["Chinese"] / 4:
        scripts["Chinese"] = 0
    other = [f"{name} ({count / len(texts):.0%})" for name, count in scripts.items() if count > len(texts) / 20]
    words = Counter(re.findall(r"[^\W\d_]+", " ".join(texts.slice(0, 2000).to_pylist()).lower()))
    found = {name: sum(words[word] for word in listed.split()) for name, listed in _WORDS.items()}
    best = max(found, key=found.get)
    latin = [best] if found[best] >= 10 and sum(scripts.values()) < len(texts) / 2 else []
    said = ", ".join(latin + other)
    return f"Texts look {said}." if said else ""
