"""The text that stands for a product, and the encoders that turn text into vectors.

`LsaEncoder` (TF-IDF and a truncated SVD) needs no download and is stored as JSON and .npy, never as a pickle; any
Hugging Face model serves through `HuggingFaceEncoder`. Heavy libraries are imported on first use: a recipe needs none.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.columns import require_columns
from catid2_ray.catalog.products import joined
from catid2_ray.errors import EncoderError, InputError
from catid2_ray.scripts import RULES, words_of

TEXT_COLUMNS = ("title", "category_path", "description")
PATH_JOINER = " > "
_MODEL_READS = ("input_ids", "attention_mask")
_PIECE = 32  # texts of a pass with gradient
TINY_NORM = 1e-6  # a projection this short is rounding noise: its direction says nothing about the text


def join_text(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """One text per row of a checked product table: `columns` in the given order, joined by ". ", nulls left out.

    `columns`: among title, category_path and description (the paper joins all three; Table 4 leaves the path out). A
    path reads "Hardware > Hinges". Raises InputError for another column or one that the table lacks.
    """
    unknown = [name for name in columns if name not in TEXT_COLUMNS]
    if unknown or not columns:
        raise InputError(f"text columns {list(columns)}: expected one or more of {', '.join(TEXT_COLUMNS)}")
    require_columns(table, columns, what="product table")
    parts = [
        pc.binary_join(table[name], PATH_JOINER) if name == "category_path" else table[name].cast(pa.string())
        for name in columns
    ]
    return joined(parts).to_pylist()


class LsaEncoder:
    """Latent semantic analysis: TF-IDF of words and word pairs (1 + log tf), projected on the first D singular vectors.

    Deerwester et al. 1990; scikit-learn fits both halves, and encoding does without it, as importing it takes .8 seconds. The
    words are those of `scripts.words_of`, by the rules of the day when it was fitted. Made by `fit` or `load`. A text without any
    known word gets the mean direction of the texts it was fitted on.
    """

    def __init__(self, terms: list[str], idf_V: np.ndarray, components_DV: np.ndarray, mean_D: np.ndarray, *,
                 rules: int = RULES):  # fmt: skip
        self.terms = terms
        self.idf_V = idf_V
        self.components_DV = components_DV
        self.mean_D = mean_D
        self.rules = rules
        self.width = len(mean_D)
        self._place_of = {term: place for place, term in enumerate(terms)}
        self._components_VD = np.ascontiguousarray(components_DV.T)

    @classmethod
    def fit(cls, texts: Sequence[str], *, width: int, vocabulary: int, seed: int) -> "LsaEncoder":
        """Fit on N texts; keep the `vocabulary` most frequent words and pairs. Memory: about 4·D·(N + 2V) bytes.

        Raises InputError when the texts hold fewer than `width` different terms, or are fewer than `width`.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits

        # One-letter words stay: "3 in." and "M 8" tell products apart.
        vectorizer = TfidfVectorizer(
            max_features=vocabulary, ngram_range=(1, 2), sublinear_tf=True, lowercase=False, dtype=np.float32, token_pattern=None,
            tokenizer=partial(words_of, single=True, rules=RULES),
        )  # fmt: skip
        try:
            weight_NV = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise InputError(f"the encoder found no word in {len(texts)} texts; check embedding.text") from error
        if min(weight_NV.shape) < width:
            raise InputError(
                f"{len(texts)} texts with {weight_NV.shape[1]} different terms cannot span {width} dimensions; "
                f"set embedding.width to at most {min(weight_NV.shape)} or give more products"
            )
        svd = TruncatedSVD(n_components=width, random_state=seed)
        with threadpool_limits(1):  # another number of threads adds in another order: other bits, and other IDs
            vector_ND = _unit_rows(svd.fit_transform(weight_NV), np.zeros(width))
        mean_D = vector_ND.mean(0, dtype=np.float64)
        length = np.linalg.norm(mean_D)
        mean_D = mean_D / length if length > TINY_NORM else np.eye(width)[0]
        terms = [str(term) for term in vectorizer.get_feature_names_out()]
        components_DV = np.ascontiguousarray(svd.components_, np.float32)
        return cls(terms, np.asarray(vectorizer.idf_, np.float32), components_DV, mean_D.astype(np.float32))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 N×D, rows of length 1; a row depends on its own text only."""
        vector_ND = np.empty((len(texts), self.width), np.float32)
        for row, text in enumerate(texts):
            place_T, weight_T = self._weighed(text)
            # The sum of rows one after another, as of a sparse product: the same bits on every CPU.
            vector_ND[row] = (weight_T[:, None] * self._components_VD[place_T]).sum(0)
        return _unit_rows(vector_ND, self.mean_D)

    def _weighed(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The known words and pairs of a text, by their places, and their float32 weights (1 + log tf) · idf, of length 1."""
        words = words_of(text, single=True, rules=self.rules)
        pairs = (" ".join(pair) for pair in itertools.pairwise(words))
        count = Counter(place for term in (*words, *pairs) if (place := self._place_of.get(term)) is not None)
        place_T = np.array(sorted(count), np.int64)
        weight_T = np.log(np.array([count[place] for place in place_T], np.float32)) + np.float32(1)
        weight_T *= self.idf_V[place_T]
        length = np.sqrt((weight_T * weight_T).sum(dtype=np.float64))
        return place_T, (weight_T / length).astype(np.float32) if len(place_T) else weight_T

    def save(self, folder: str | os.PathLike) -> None:
        """Write vocabulary.json, idf.npy, components.npy, mean.npy (D·V·4 bytes) and, where the rules for words are not those
        of releases without that file, words.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocabulary.json").write_text(json.dumps(self.terms, ensure_ascii=False), encoding="utf-8")
        if self.rules > 1:
            (folder / "words.json").write_text(json.dumps({"rules": self.rules}), encoding="utf-8")
        for name, values in (("idf", self.idf_V), ("components", self.components_DV), ("mean", self.mean_D)):
            np.save(folder / f"{name}.npy", values, allow_pickle=False)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "LsaEncoder":
        """The inverse of `save`; encodes to the same bits. Raises EncoderError when a file is missing or damaged."""
        folder = Path(folder)
        try:
            terms = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            arrays = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("idf", "components", "mean")]
            says, rules = folder / "words.json", 1
            if says.exists():
                rules = json.loads(says.read_text(encoding="utf-8"))["rules"]
        except (OSError, ValueError, EOFError) as error:
            raise EncoderError(
                f"{folder} holds no complete LSA encoder ({error}); embed the catalogue again"
            ) from error
        if arrays[1].shape != (len(arrays[2]), len(terms)) or arrays[0].shape != (len(terms),):
            raise EncoderError(
                f"{folder}: {len(terms)} terms, idf {arrays[0].shape}, components {arrays[1].shape} and mean "
                f"{arrays[2].shape} do not belong together; embed the catalogue again"
            )
        return cls(terms, *arrays, rules=rules)


def _unit_rows(vector_ND: np.ndarray, fallback_D: np.ndarray) -> np.ndarray:
    vector_ND = vector_ND.astype(np.float32, copy=False)
    length_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    unit_ND = vector_ND / np.maximum(length_N1, TINY_NORM)
    return np.where(length_N1 > TINY_NORM, unit_ND, fallback_D.astype(np.float32))


class HuggingFaceEncoder:
    """Any Hugging Face text model by id or local folder: mean of the last hidden states over real tokens, length 1.

    `batch`: texts per forward pass; `tokens`: longer texts are cut to this many. float32 throughout; of an
    encoder-decoder model only the encoder is used. Every pass has `batch` rows of one of few lengths (multiples of 8),
    filled up where need be, so that a text's vector is the same bit for bit whatever texts are encoded with it; another
    `batch` may move it by 1e-5. Raises EncoderError when the model cannot be loaded.
    """

    def __init__(self, name_or_folder: str, *, batch: int, tokens: int, device: str = "cpu"):
        self.batch, self.tokens, self.device = batch, tokens, device
        self._tokenizer, model = _load_pretrained(str(name_or_folder))
        self._is_part = model.config.is_encoder_decoder
        if self._is_part:
            model = model.get_encoder()
        if self._tokenizer.pad_token is None:
            # Padding is masked out of the mean, so any token of the vocabulary will do.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        self._model = model.float().eval().to(device)
        self.width = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 N×D, rows of length 1, in the order of `texts`."""
        import torch

        vector_ND = np.empty((len(texts), self.width), np.float32)
        if not len(texts):
            return vector_ND
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.tokens, return_token_type_ids=False)
        length_N = np.array([min(-(-len(ids) // 8) * 8, self.tokens) for ids in encoded["input_ids"]])
        with torch.no_grad():
            for length in np.unique(length_N):
                rows_N = np.flatnonzero(length_N == length)
                for start in range(0, len(rows_N), self.batch):
                    rows = rows_N[start : start + self.batch]
                    vector_ND[rows] = self._pooled(encoded, np.resize(rows, self.batch), int(length))[: len(rows)]
        return vector_ND

    def _pooled(self, encoded, rows: np.ndarray, length: int) -> np.ndarray:
        """float32 len(rows)×D: one forward pass over texts padded to `length` tokens."""
        part = {key: [encoded[key][row] for row in rows] for key in _MODEL_READS}
        padded = self._tokenizer.pad(part, padding="max_length", max_length=length, return_tensors="pt")
        return self._unit(padded).cpu().numpy()

    def _unit(self, padded):
        """Tensor B×D: means over real tokens, length 1."""
        import torch

        padded = padded.to(self.device)
        hidden_BTD = self._model(**padded).last_hidden_state
        mask_BT1 = padded["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
        pooled_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled_BD, dim=-1)

    def with_gradient(self, texts: Sequence[str]):
        """Tensor B×D of these texts, for whoever trains `parameters`; not to the bit what `encode` gives.

        Texts of like length go together, a few at a time: padded to the longest of a batch they would take twice as long."""
        import torch

        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.tokens, return_token_type_ids=False)
        order = sorted(range(len(texts)), key=lambda row: (len(encoded["input_ids"][row]), row))
        pieces = [
            self._unit(
                self._tokenizer.pad(
                    {key: [encoded[key][row] for row in order[start : start + _PIECE]] for key in _MODEL_READS},
                    return_tensors="pt",
                )
            )
            for start in range(0, len(order), _PIECE)
        ]
        return torch.cat(pieces)[np.argsort(order)]

    def parameters(self):
        """Of the model; what trains them changes what `encode` gives."""
        return self._model.parameters()

    def save(self, folder: str | os.PathLike) -> None:
        """Write model.safetensors (float32), config.json and the tokenizer's JSON files into `folder`, from which this class reads
        the same encoder. EncoderError for a model of which only a part is used (`refuse_a_part`)."""
        self.refuse_a_part()
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def refuse_a_part(self) -> None:
        """EncoderError for the encoder of an encoder-decoder model, which would not be read again as what it is."""
        if self._is_part:
            raise EncoderError(
                "the encoder is half of an encoder-decoder model (a T5, say), which cannot be tuned: name a model that is an "
                "encoder and nothing else, or set embedding.encoder_mode to frozen"
            )


def _load_pretrained(name: str):
    import torch
    from huggingface_hub import constants
    from transformers import AutoModel, AutoTokenizer

    is_folder = os.path.isdir(name)
    remedy = "give the id of a model on the Hugging Face hub, a folder with one, or set embedding.encoder to lsa"
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") != 1 and "/" in name):
        raise EncoderError(f"encoder {name!r}: no such folder; {remedy}")
    try:
        # False, not left out: transformers would ask whoever sits at the terminal whether to run a model's own code.
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            name, local_files_only=is_folder, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # the hub client, tokenizers and safetensors each have error trees of their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_folder:
            why = "the folder holds no model that transformers can load"
        elif constants.HF_HUB_OFFLINE:
            why = "not in the local cache, and HF_HUB_OFFLINE is set"
        else:
            why = "neither a folder nor a model that the hub answered for (offline, or no such id)"
        raise EncoderError(f"encoder {name!r}: {why} ({first_line}); {remedy}") from error
    return tokenizer, model
