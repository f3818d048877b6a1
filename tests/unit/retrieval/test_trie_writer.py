"""Ranges of IDs, however they are cut, are written as the trie of all IDs at once is saved: the same files, byte for byte."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval import trie_writer
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_writer import TrieWriter


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def ids(draw):
    """(codes per level, whether products share IDs, ascending packed IDs, where they are cut)."""
    space = DocidSpace(tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))))
    shared = draw(st.booleans())
    packed = draw(st.lists(st.integers(0, space.capacity - 1), min_size=1, max_size=40, unique=not shared))
    cuts = sorted(draw(st.lists(st.integers(0, len(packed)), max_size=6)))
    return space.codes_per_level, shared, np.array(sorted(packed), np.int64), cuts


@settings(max_examples=80, deadline=None)
@given(ids(), st.sampled_from([2, 1 << 20]))
def test_it_writes_what_the_whole_trie_saves(tmp_path_factory, table, block):
    codes_per_level, shared, packed_N, cuts = table
    whole, written = (tmp_path_factory.mktemp("trie") for _ in range(2))
    Trie.from_sorted(packed_N, codes_per_level=codes_per_level, shared=shared).save(whole, identity="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_writer, "_BLOCK", block)
        with TrieWriter(written, len(packed_N), codes_per_level=codes_per_level, shared=shared) as writer:
            for part in np.split(packed_N, cuts):
                writer.add(part)
            writer.finish(identity="x")
    assert files(written) == files(whole)


def test_a_sparse_trie_is_written_by_its_exceptions(tmp_path):
    space = DocidSpace((256, 256, 256, 256))
    packed_N = np.unique(np.random.default_rng(0).integers(0, space.capacity, 20_000))
    Trie.from_sorted(packed_N, codes_per_level=space.codes_per_level).save(tmp_path / "whole")
    with TrieWriter(tmp_path / "written", len(packed_N), codes_per_level=space.codes_per_level) as writer:
        for part in np.array_split(packed_N, 7):
            writer.add(part)
        writer.finish()
    assert files(tmp_path / "written") == files(tmp_path / "whole")
    Trie.open(tmp_path / "written").check()


@pytest.mark.parametrize(
    "parts, message",
    [
        ([[1, 0]], "must ascend"),
        ([[2], [1]], "must ascend"),
        ([[0, 1], [1]], "rows 1 and 2 share the ID <a_0><b_1>"),
        ([[4]], "has 0 to 3"),
        ([[-1]], "has 0 to 3"),
        ([[0]], "a trie of 3 IDs was told of 1"),
        ([], "a trie of 3 IDs was told of 0"),
    ],
)
def test_it_refuses(parts, message, tmp_path):
    with TrieWriter(tmp_path, 3, codes_per_level=(2, 2)) as writer, pytest.raises(InputError, match=message):
        for part in parts:
            writer.add(np.array(part, np.int64))
        writer.finish()
    with pytest.raises(Exception, match="trie.json is missing"):
        Trie.open(tmp_path)
