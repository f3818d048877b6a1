"""Words for scripts that write none: runs of Chinese characters and Japanese kana are cut into overlapping pairs.

Character pairs are what Lucene's CJKAnalyzer indexes; they need no dictionary. Thai, Lao, Khmer and Burmese, which write no
spaces either, are left as they are; Korean has spaces. Texts without such a run come back as the same object.
"""

import re
import unicodedata

# Kana with their prolongation and iteration marks, 々〆〇, Han with its extensions; the middle dot ・ separates.
UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U000323af"
)
_RUN = re.compile(f"[{UNSPACED}]+")
_ANY_WIDTH = re.compile(f"[{UNSPACED}\uff01-\uffdc]")
# Full-width letters and half-width katakana, the voiced marks of which become one with their letter.
_WIDTH = re.compile("[\uff01-\uffdc]+")


def pairs_of_unspaced(text: str, *, singles: bool = False) -> str:
    """`text` with every run of unspaced characters as its overlapping pairs, set off by spaces; O(length).

    "折りたたみ傘 55cm" → "折り りた たた たみ み傘 55cm". A run of one character stays; with `singles` the characters of longer
    runs follow their pairs, so that a query of one character finds them. Widths are folded: "ｶﾒﾗ" is "カメラ", "ＵＳＢ" "USB".
    """
    if text.isascii() or not _ANY_WIDTH.search(text):
        return text
    text = _WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    return _RUN.sub(lambda run: f" {_pairs(run[0], singles)} ", text)


def _pairs(run: str, singles: bool) -> str:
    if len(run) == 1:
        return run
    words = [run[i : i + 2] for i in range(len(run) - 1)]
    return " ".join(words + list(run) if singles else words)
