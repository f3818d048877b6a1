"""A T5 read without transformers encodes, scores and tokenizes as transformers does, which is the oracle here."""

import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from catid2_ray.catalog.text import LsaEncoder
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError
from catid2_ray.generator.logits import with_head
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.plain_t5 import PlainT5, PlainTokenizer, T5Norm
from catid2_ray.generator.saved import load_generator, load_to_search, save_generator
from catid2_ray.generator.vocabulary import tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.retrieval.exact import exact_scores
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie

SPACE = DocidSpace((4, 3, 5))
TEXTS = ["steel hinge", "oak door 10 ft", "", "</s> <a_1> <pad>", "brass " * 40, "Ｓｔｅｅｌ, 3/4 in."]


def saved(folder, *, activation="relu", head="plain", tied=True, half=False):
    """A random T5 of three encoder and two decoder layers with its tokenizer in `folder`."""
    tokenizer = with_docid_tokens(train_tokenizer(["steel hinge brass", "oak door 10 ft"] * 3, size=70), SPACE)
    model = small_t5(
        vocabulary=len(tokenizer) - sum(SPACE.codes_per_level), width=16, layers=(3, 2), heads=2, feed_forward=24, dropout=0.1,
        codes_per_level=SPACE.codes_per_level, activation=activation, seed=1,
    )  # fmt: skip
    if not tied:
        config = model.config
        config.tie_word_embeddings, config.scale_decoder_outputs = False, False
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name or "relative_attention_bias" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    with_head(model, head, rank=4)
    if head == "pawa":
        torch.nn.init.normal_(model.pawa.up.weight)
    save_generator(model.bfloat16() if half else model, tokenizer, folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation": "gated-gelu", "tied": False}, {"head": "pawa"}, {"half": True}],
    ids=["tied", "v1.1", "pawa", "saved in bfloat16"],
)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_scores_are_those_of_transformers(settings, weights, tmp_path):
    (theirs, tokenizer), (ours, plain) = load_generator(saved(tmp_path, **settings)), load_to_search(tmp_path)
    theirs = theirs.float()
    assert isinstance(ours, PlainT5) and isinstance(plain, PlainTokenizer) and not ours.training
    ids_BT = torch.as_tensor(tokenize(tokenizer, TEXTS, length=24)).long()
    mask_BT = (ids_BT != 0).long()
    codes_NL = torch.cartesian_prod(*map(torch.arange, SPACE.codes_per_level)).numpy()
    trie = Trie.build(codes_NL, codes_per_level=SPACE.codes_per_level)
    found = [
        exact_scores(T5Decoder(model, codes_per_level=SPACE.codes_per_level, weights=weights), trie, ids_BT, mask_BT)
        for model in (theirs, ours)
    ]
    for their, our in zip(*found):
        torch.testing.assert_close(torch.as_tensor(our), torch.as_tensor(their), atol=1e-4, rtol=1e-4)


def test_positions_far_apart_share_buckets_as_in_transformers(tmp_path):
    (theirs, _), (ours, _) = load_generator(saved(tmp_path)), load_to_search(tmp_path)
    for stack in ("encoder", "decoder"):
        both = [getattr(model, stack).block[0].layer[0].SelfAttention for model in (theirs, ours)]
        assert torch.equal(*(attention.compute_bias(400, 300) for attention in both))


def test_the_norm_is_theirs_to_the_bit():
    ours, theirs = T5Norm(16), T5LayerNorm(16)
    for kind in (torch.float32, torch.bfloat16):
        hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).to(kind)
        assert torch.equal(ours.to(kind)(hidden), theirs.to(kind)(hidden))


@pytest.mark.parametrize("length", [2, 5, 24])
def test_texts_become_the_same_tokens(length, tmp_path):
    saved(tmp_path)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), PlainTokenizer(tmp_path)
    assert (tokenize(ours, TEXTS, length=length) == tokenize(theirs, TEXTS, length=length)).all()
    assert ours.pad_token_id == theirs.pad_token_id == 0


def test_what_it_cannot_read_is_left_to_transformers(tmp_path):
    (saved(tmp_path) / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ArtifactError, match="holds no generator that can be read"):
        load_to_search(tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="export it again"):
        load_to_search(tmp_path)


def test_a_search_imports_no_library_that_it_does_without(tmp_path):
    """Of the 4.9 seconds that a search took, these took three."""
    saved(tmp_path / "generator")
    titles = [f"{size} inch {metal} hinge" for size in (2, 3, 4) for metal in ("steel", "brass")]
    LsaEncoder.fit(titles, width=2, vocabulary=50, seed=1).save(tmp_path / "encoder")
    code = (
        "import sys\n"
        "from catid2_ray.cli import app\n"
        "from catid2_ray.on_ray.machine import live_log, query_encoder\n"
        "from catid2_ray.generator.saved import load_to_search\n"
        "from catid2_ray.retrieval.t5_decoder import T5Decoder\n"
        "model, tokenizer = load_to_search('generator')\n"
        "T5Decoder(model, codes_per_level=(4, 3, 5)); tokenizer.padded(['steel'], 8)\n"
        "query_encoder.query_encoder('.', {'name': 'lsa'})(['steel'])\n"
        "slow = ('transformers', 'sklearn', 'scipy', 'ray', 'matplotlib', 'deepspeed', 'torch._dynamo', 's3fs')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
