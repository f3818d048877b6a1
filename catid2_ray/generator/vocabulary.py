"""Words as numbers: a tokenizer trained on the catalogue's own text or a pretrained one, one token per (level, code) at its end.

Letters and numbers are split from each other, so "10ft" and "10 ft" are the same tokens and "3/4" stays whole;
punctuation that says nothing about a product is dropped. Japanese, which has no spaces, is split where its script changes:
a rough word boundary that needs no dictionary, and without which a whole title would be one word.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, InputError, RecipeError
from catid2_ray.generator.plain_t5 import PlainTokenizer
from catid2_ray.scripts import APART, FOLDED, invisible

if TYPE_CHECKING:  # a search does without transformers, which takes half a second to import
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = 0, 1, 2
_SPECIAL = ("<pad>", "</s>", "<unk>")
_CHUNK = 8192  # texts that are tokenized together
# A number with its decimal point or fraction | Chinese characters | hiragana | katakana | any other letters with their marks
# | the few signs that carry a unit or a meaning. The prolongation mark ー belongs to both kana, but to no script.
_WORD = (
    r"\d+(?:[./]\d+)*|\p{Han}+|[\p{Hiragana}ー]+|[\p{Katakana}ー]+"
    r"|[[\p{L}\p{M}]&&[^\p{Han}\p{Hiragana}\p{Katakana}ー]]+"
    r"""|[%"'#&+°$]"""
)


# Training is quadratic in the length of a word: 100,000 letters take minutes, a million hang.
_LONGEST_TEXT, _LONGEST_WORD = 4096, 256
_LONG_WORD = re.compile(rf"(\S{{{_LONGEST_WORD}}})\S+")


def train_tokenizer(texts: Iterable[str], *, size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-pair vocabulary of at most `size` entries (more only if the texts hold more distinct characters).

    `<pad>` is 0, `</s>` 1 (appended to every text), `<unk>` 2; texts are read as `scripts.normalised` gives them, and for the
    training cut to 4096 characters and 256 a word. The same texts in the same order give
    the same vocabulary. Raises RecipeError for a size that leaves no room for subwords, InputError for no text.
    """
    from transformers import PreTrainedTokenizerFast

    if size < 64:
        raise RecipeError(f"a vocabulary of {size} entries cannot hold an alphabet; set at least 64")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(character, text) for character, text in APART.items()),
            # Before NFKC, so that a letter and its mark on both sides of an invisible character become one.
            normalizers.Replace(Regex(f"[{_without_surrogates(invisible())}]"), ""),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            *(normalizers.Replace(folded, letter) for folded, letter in FOLDED.items()),
            normalizers.Replace(Regex(r"(?<=\d),(?=\d{3})"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False)
    cut = (_LONG_WORD.sub(r"\1", text[:_LONGEST_TEXT]) for text in texts)
    tokenizer.train_from_iterator(cut, trainer=trainer)
    if tokenizer.get_vocab_size() <= len(_SPECIAL):
        raise InputError("no text to train a vocabulary on: the texts are empty or hold only punctuation")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def _without_surrogates(characters: str) -> str:
    """The tokenizers' text is UTF-8, which has no halves of pairs."""
    return characters.replace("\ud800-\udfff", "")


def load_tokenizer(name_or_folder: str, *, kind: str = "t5") -> "PreTrainedTokenizerFast":
    """The tokenizer of a pretrained model, by hub id or local folder. Raises EncoderError when it cannot be had.

    `kind`: a "t5" must pad with 0 and end with 1; the tokenizer of an "encoder_decoder"'s text encoder must have a
    padding token; a "causal" model's that has none pads with its end-of-text token, which no text contains.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
    except Exception as error:
        raise EncoderError(
            f"no tokenizer could be loaded from {str(name_or_folder)!r} ({type(error).__name__}: {error}); "
            "give a folder with tokenizer.json, a hub id that exists, or make the model hub reachable"
        ) from error
    if kind == "t5" and (tokenizer.pad_token_id != PAD or tokenizer.eos_token_id != EOS):
        raise EncoderError(
            f"the tokenizer of {str(name_or_folder)!r} has <pad>={tokenizer.pad_token_id} and "
            f"</s>={tokenizer.eos_token_id}, expected {PAD} and {EOS} as in every T5; choose a T5 model"
        )
    if kind == "causal" and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise EncoderError(
            f"the tokenizer of {str(name_or_folder)!r} has no padding token, which texts of unlike length need; choose "
            "another model"
        )
    return tokenizer


class Marks(NamedTuple):
    """Token ids that are no text: padding, and what a tokenizer puts around every text ([CLS], [SEP], `</s>`)."""

    pad: int
    special: tuple[int, ...]


def marks(tokenizer: "PreTrainedTokenizerFast") -> Marks:
    """The marks of any tokenizer that has a padding token."""
    named = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return Marks(tokenizer.pad_token_id, tuple(sorted({m for m in named if m is not None} - {tokenizer.pad_token_id})))


def pad_of(model) -> int:
    """The padding token of a generator's texts; 0 where it does not say."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return PAD if pad is None else pad


def with_docid_tokens(tokenizer: "PreTrainedTokenizerFast", space: DocidSpace) -> "PreTrainedTokenizerFast":
    """Add the ΣK tokens `<a_0>`, … level after level as the last entries, in place, and return the tokenizer.

    (CAT-ID², section 3.4: one new token per level and code.) Does nothing when they already are the last entries in
    that order. Raises InputError when some exist elsewhere, or the vocabulary's numbering has holes.
    """
    tokens = space.tokens()
    known = tokenizer.get_vocab()
    present = [token for token in tokens if token in known]
    base = len(tokenizer) - len(present)
    if present:
        places = np.array([known[token] for token in present])
        if len(present) != len(tokens) or not np.array_equal(places, base + np.arange(len(tokens))):
            raise InputError(
                f"the vocabulary already holds {len(present)} of the {len(tokens)} ID tokens, first {present[0]!r} at "
                f"{known[present[0]]}, expected all of them as its last entries from {base}; use a fresh tokenizer"
            )
        return tokenizer
    if max(known.values()) != len(tokenizer) - 1:
        raise InputError(
            f"the vocabulary has {len(tokenizer)} entries but its highest number is {max(known.values())}; "
            "ID tokens must follow without a hole"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True)
    return tokenizer


def frame(tokenizer: "PreTrainedTokenizerFast | PlainTokenizer") -> tuple[list[int], list[int]]:
    """The marks that the tokenizer sets before and after every text: ([], [</s>]) for T5, ([CLS], [SEP]) for BERT."""
    if isinstance(tokenizer, PlainTokenizer):  # a T5's
        return [], tokenizer.ids("")
    marks = list(tokenizer("")["input_ids"])
    return (marks[:-1], marks[-1:]) if marks[-1:] != [tokenizer.bos_token_id] else (marks, [])


def bare_words(
    tokenizer: "PreTrainedTokenizerFast | PlainTokenizer", texts: Sequence[str], *, length: int
) -> np.ndarray:
    """int32 N×`length`: token ids without the tokenizer's marks, cut and padded as `tokenize` does."""
    ids_NT = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
    if isinstance(tokenizer, PlainTokenizer):
        for row, text in enumerate(texts):
            words = tokenizer.ids(text, marks=False)[:length]
            ids_NT[row, : len(words)] = words
    elif len(texts):
        ids_NT[:] = tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, max_length=length, truncation=True,
            padding="max_length", padding_side="right", return_attention_mask=False,
        )["input_ids"]  # fmt: skip
    return ids_NT


def starts_word(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """bool V: whether a token begins a word. Knows the marks `▁` (T5, ours), `Ġ` (byte level) and `##` (WordPiece)."""
    token_V = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), dtype=np.str_)
    for mark in ("▁", "Ġ"):
        begins_V = np.char.startswith(token_V, mark)
        if begins_V.any():
            break
    else:
        begins_V = ~np.char.startswith(token_V, "##")
    return begins_V


def tokenize(tokenizer: "PreTrainedTokenizerFast | PlainTokenizer", texts: Sequence[str], *, length: int) -> np.ndarray:
    """int32 N×`length`: token ids with the tokenizer's own marks (`</s>`; [CLS] and [SEP]), cut to `length`, padded on
    the right with its padding token (0 in T5 and BERT).

    ID tokens or `</s>` written out in a text are read as plain characters. Raises InputError for a length below 2.
    """
    if length < 2:
        raise InputError(f"texts need at least 2 tokens (one and </s>), found length={length}")
    ids_NT = np.zeros((len(texts), length), np.int32)
    for start in range(0, len(texts), _CHUNK):
        if isinstance(tokenizer, PlainTokenizer):
            ids_NT[start : start + _CHUNK] = tokenizer.padded(list(texts[start : start + _CHUNK]), length)
            continue
        encoded = tokenizer(
            list(texts[start : start + _CHUNK]),
            max_length=length,
            truncation=True,
            padding="max_length",
            padding_side="right",
            split_special_tokens=True,
            return_attention_mask=False,
        )
        ids_NT[start : start + _CHUNK] = encoded["input_ids"]
    return ids_NT


class Cut(NamedTuple):
    """`input_ids_NT` as `tokenize` gives them; `cut_N` bool: texts that were longer."""

    input_ids_NT: np.ndarray
    cut_N: np.ndarray


def tokenize_cut(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], *, length: int) -> Cut:
    """`tokenize`, and which texts lost something by it."""
    longer_NT = tokenize(tokenizer, texts, length=length + 1)
    cut_N = longer_NT[:, length] != tokenizer.pad_token_id
    marks = len(frame(tokenizer)[1])
    # The end marks of a text that is one token too long move one place to the left, over its last word.
    longer_NT[cut_N, length - marks : length] = longer_NT[cut_N, length - marks + 1 : length + 1]
    return Cut(np.ascontiguousarray(longer_NT[:, :length]), cut_N)
