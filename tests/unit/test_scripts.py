"""Character pairs for scripts without spaces, and texts in other scripts left as they are."""

import pytest

from catid2_ray.scripts import pairs_of_unspaced


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
