"""Character pairs for scripts without spaces, and texts in other scripts left as they are."""

import pytest

from catid2_ray.scripts import normalised, pairs_of_unspaced, says_something, words_of


@pytest.mark.parametrize(
    "text, expected",
    [
        ("折りたたみ傘 55cm", "折り りた たた たみ み傘 55cm"),
        ("A4用紙", "A4 用紙"),
        ("傘", "傘"),
        ("傘・レインコート", "傘 ・ レイ イン ンコ コー ート"),
        ("ｶﾒﾗ ＵＳＢ ﾊﾞｯｸﾞ", "カメ メラ USB バッ ッグ"),
        ("色々な靴", "色々 々な な靴"),
        ("手机壳iPhone", "手机 机壳 iPhone"),
    ],
)
def test_runs_become_their_pairs(text, expected):
    assert pairs_of_unspaced(text).split() == expected.split()


def test_singles_follow_the_pairs_of_a_longer_run_only():
    assert pairs_of_unspaced("防水 傘", singles=True).split() == ["防水", "防", "水", "傘"]


@pytest.mark.parametrize("text", ["", "stainless hinge", "Nike™ ½ in.", "Bisagra de baño", "한국어 텍스트", "กระเป๋า"])
def test_other_scripts_are_left_alone(text):
    assert pairs_of_unspaced(text) is text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Oak Shelf 3/4", "oak shelf 3/4"),
        ("Cafe\u0301\u00a0CRE\u0300ME", "café crème"),
        ("\ufeffHam\u00admer\u200b", "hammer"),
        ("İPİ ı IPI", "ipi i ipi"),
        ("1½ in. ＵＳＢ m²", "1 1/2 in. usb m2"),
        ("Nike™ Ford®", "nike  ford®"),
        ("e\u200d\u0301", "é"),
        ("a\x00b \ud83d", "ab "),
        ("\u3164\ufe0f", ""),
    ],
)
def test_what_looks_alike_is_one_text(text, expected):
    assert normalised(text) == expected and normalised(expected) == expected


@pytest.mark.parametrize("text", ["", "???", "\u200b", "\x00", " \t", "\u3164", "\u0301", "— ✓ 😀"])
def test_texts_that_say_nothing(text):
    assert not says_something(text) and words_of(text, single=True) == []


@pytest.mark.parametrize("text", ["8", "x?", "①", "ア", "ก", "ة"])
def test_one_letter_or_digit_says_something(text):
    assert says_something(text)


def test_scripts_with_marks_and_without_spaces():
    assert words_of("लकड़ी की") == ["लकड़ी", "की"]
    assert words_of("ผ้าไม้") == ["ผ้า", "าไ", "ไม้"]
    assert words_of("ผ้าไม้", indexed=True) == ["ผ้า", "าไ", "ไม้", "ผ้", "า", "ไ", "ม้"]
    assert words_of("3 in. M 8", single=True) == ["3", "in", "m", "8"]
    assert words_of("कमल", rules=1) == ["कमल"] and words_of("किमाल", rules=1) == []
