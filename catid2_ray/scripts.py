"""How a text is read: one normaliser and one rule for what a word is, for BM25, the lexical score, LSA, tokenizer and leakage.

Chinese, Japanese, Thai, Lao, Burmese and Khmer write no spaces: their runs are cut into overlapping pairs of letters, as
Lucene's CJKAnalyzer does, which needs no dictionary. Korean has spaces. A vowel sign or an accent belongs to its letter.

What was written before the normaliser existed keeps its own words: `words_of(…, rules=1)`.
"""

import re
import unicodedata
from functools import cache

RULES = 2  # of `words_of`; what is stored with its words says by which rules it was made, 1 where it does not say

# Kana with their prolongation and iteration marks, 々〆〇, Han with its extensions; the middle dot ・ separates.
UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U000323af"
)
_RUN = re.compile(f"[{UNSPACED}]+")
_ANY_WIDTH = re.compile(f"[{UNSPACED}\uff01-\uffdc]")
# Full-width letters and half-width katakana, the voiced marks of which become one with their letter.
_WIDTH = re.compile("[\uff01-\uffdc]+")
# Thai, Lao, Burmese and Khmer: letters that begin a cluster; digits and signs of currency are no part of a run.
_CLUSTERED = "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ec0-\u0edf\u1000-\u102a\u1050-\u1055\u1780-\u17b3"
STOPWORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of", "on", "or",
     "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with")
)  # fmt: skip

# Letters and marks that are drawn as nothing, beside the categories Cf (soft hyphen, zero-width space …), Cc and Cs.
_UNDRAWN = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
# NFKC would join to a name or a number what stands apart: "Nike™" would be "niketm", "1½" "11⁄2".
APART = {"\u2120": " ", "\u2122": " "} | {
    fraction: " " + unicodedata.normalize("NFKC", fraction).replace("\u2044", "/")
    for fraction in map(chr, [*range(0xBC, 0xBF), *range(0x2150, 0x2160), 0x2189])
}
# After lower case: İ is "i" with a dot above it, and Turkish capitals have no dot to tell ı from i.
FOLDED = {"i\u0307": "i", "ı": "i", "ß": "ss", "\u2044": "/"}


@cache
def _classes() -> dict[str, str]:
    """Of the planes that hold letters and marks: the characters of the categories Cf and M, as the insides of a regular
    expression's brackets."""
    codes = [*range(0x20000), *range(0xE0000, 0xE0200)]
    marks, formats = [], []
    for code in codes:
        category = unicodedata.category(chr(code))
        if category in ("Mn", "Mc", "Me"):
            marks.append(code)
        elif category == "Cf":
            formats.append(code)
    return {"marks": _ranges(marks), "formats": _ranges(formats)}


def _ranges(codes: list[int]) -> str:
    starts = [code for before, code in zip([-2, *codes], codes) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2]) if after != code + 1]
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(starts, ends))


@cache
def invisible() -> str:
    """Characters that a reader does not see, blanks apart, as the inside of a regular expression's brackets: those that
    format text, control characters, halves of a broken pair, and letters that are drawn as nothing."""
    controls = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
    return _classes()["formats"] + controls + _UNDRAWN + "\ud800-\udfff"


@cache
def _patterns() -> dict[str, re.Pattern]:
    marks = _classes()["marks"]
    word = rf"\w[\w{marks}]+|[{UNSPACED}{_CLUSTERED}]"
    return {
        "invisible": re.compile(f"[{invisible()}]"),
        "word": re.compile(word),
        "word or letter": re.compile(rf"{word}|\w"),
        "clusters": re.compile(f"(?:[{_CLUSTERED}][{marks}]*)+"),
        "cluster": re.compile(f"[{_CLUSTERED}][{marks}]*"),
        "apart": re.compile(f"[{''.join(APART)}]"),
    }


def normalised(text: str) -> str:
    """`text` as it is compared: NFKC, without invisible characters, lower case, every İ and ı an i, blanks as they are.

    Two spellings that look alike are one: "Cafe\u0301" and "café", "Wasch\u00admaschine" and "waschmaschine".
    """
    if text.isascii() and text.isprintable():
        return text.lower()
    patterns = _patterns()
    text = patterns["apart"].sub(lambda found: APART[found[0]], text)
    text = unicodedata.normalize("NFKC", patterns["invisible"].sub("", text)).lower()
    for folded, letter in FOLDED.items():
        text = text.replace(folded, letter)
    return text


def says_something(text: str) -> bool:
    """Whether a letter or a digit is left of `text` once it is normalised; "???" and a zero-width space say nothing."""
    return any(character.isalnum() for character in normalised(text))


def words_of(text: str, *, indexed: bool = False, single: bool = False, rules: int = RULES) -> list[str]:
    """The words of a text, in their order, normalised.

    A word has two characters or more, or with `single` one; of scripts without spaces, pairs of letters are the words and,
    where a text is `indexed`, single letters too, so that a query of one letter finds them. `rules` 1: as before the
    normaliser, for what was stored then.
    """
    if rules == 1:
        pattern = _WORD_1_SINGLE if single else _WORD_1
        return pattern.findall(pairs_of_unspaced(text, singles=indexed).lower())
    text = normalised(text)
    if text.isascii():
        return (_ASCII_SINGLE if single else _ASCII).findall(text)
    patterns = _patterns()
    text = patterns["clusters"].sub(lambda run: f" {_cluster_pairs(run[0], indexed)} ", text)
    text = pairs_of_unspaced(text, singles=indexed)
    return patterns["word or letter" if single else "word"].findall(text)


_WORD_1, _WORD_1_SINGLE = re.compile(rf"(?u)\b\w\w+\b|[{UNSPACED}]"), re.compile(r"(?u)\b\w+\b")
_ASCII, _ASCII_SINGLE = re.compile(r"\w\w+"), re.compile(r"\w+")


def pairs_of_unspaced(text: str, *, singles: bool = False) -> str:
    """`text` with every run of Chinese or Japanese characters as its overlapping pairs, set off by spaces; O(length).

    "折りたたみ傘 55cm" → "折り りた たた たみ み傘 55cm". A run of one character stays; with `singles` the characters of longer
    runs follow their pairs, so that a query of one character finds them. Widths are folded: "ｶﾒﾗ" is "カメラ", "ＵＳＢ" "USB".
    A text without such a run comes back as the same object.
    """
    if text.isascii() or not _ANY_WIDTH.search(text):
        return text
    text = _WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return _RUN.sub(lambda run: f" {_pairs(list(run[0]), singles)} ", text)


def _cluster_pairs(run: str, singles: bool) -> str:
    return _pairs(_patterns()["cluster"].findall(run), singles)


def _pairs(letters: list[str], singles: bool) -> str:
    if len(letters) == 1:
        return letters[0]
    words = ["".join(letters[i : i + 2]) for i in range(len(letters) - 1)]
    return " ".join(words + letters if singles else words)
