"""Tiny random models of each kind with a tokenizer, for tests of generators: a BERT in a folder, and a Qwen2."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ("steel", "hinge", "brass", "copper", "pipe", "oak", "door", "table", "##s", "10", "ft")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of 15 entries: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then words."""
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_bert(folder) -> str:
    """A random BERT of width 24 with its tokenizer, in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=15,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
        BertModel(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return str(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens and no marks around a text; 0 is a word, the end of text, 11, stands in for padding."""
    vocabulary = {token: number for number, token in enumerate((*WORDS, "<|end|>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="ft"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", padding_side="left")


def save_qwen(folder, *, tied: bool) -> str:
    """A random Qwen2 of width 24 with 4 heads, 2 of keys, and 3 rows more than `word_tokenizer` has, in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = Qwen2Config(
            vocab_size=len(WORDS) + 1 + 3, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)
