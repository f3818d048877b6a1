"""Tiny random models of each kind with a tokenizer, for tests of generators: a BERT in a folder, a Qwen2, and an mT5."""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = ("steel", "hinge", "brass", "copper", "pipe", "oak", "door", "table", "##s", "10", "ft")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def bert_tokenizer(words: Iterable[str] = WORDS) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer, of 15 entries unless other words are given: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then words."""
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_bert(folder, words: Iterable[str] = WORDS) -> str:
    """A random BERT of width 24 with its tokenizer of these words, in `folder`."""
    tokenizer = bert_tokenizer(words)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens and no marks around a text; 0 is a word, the end of text, 11, stands in for padding."""
    vocabulary = {token: number for number, token in enumerate((*WORDS, "<|end|>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="ft"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", padding_side="left")


def save_qwen(folder, *, tied: bool, words: int = len(WORDS) + 1) -> str:
    """A random Qwen2 of width 24 with 4 heads, 2 of keys, and 3 rows more than the `words` of its tokenizer, in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = Qwen2Config(
            vocab_size=words + 3, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_mt5(folder: Path, texts: Iterable[str], *, words: int) -> MT5ForConditionalGeneration:
    """A random mT5 of width 16 as mT5 is published: a SentencePiece model of `texts` and a file of torch.load, in `folder`."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=words, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    config = MT5Config(
        vocab_size=2 * words, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    config.architectures = ["MT5ForConditionalGeneration"]
    config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": null}'
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = MT5ForConditionalGeneration(config)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model
