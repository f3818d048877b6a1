"""Queries that a seq2seq model makes up for titles (docT5query, as NCI trains on, 2206.02743, section 3.2).

Sampled, not searched, since several different queries of a title are wanted. What is drawn depends on the seed and on the batch
that a title is in: on the place and the titles of the batch.
"""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from catid2_ray.errors import EncoderError
from catid2_ray.schedule import seed_from


class Doc2Query:
    """A seq2seq model by hub id or folder. Raises EncoderError when it cannot be loaded."""

    def __init__(self, name_or_folder: str, *, input_tokens: int = 64, output_tokens: int = 24, top_k: int = 10, batch: int = 64,
                 device: str = "cpu"):  # fmt: skip
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
            self.model = AutoModelForSeq2SeqLM.from_pretrained(name_or_folder).eval().to(device)
        except Exception as error:
            raise EncoderError(
                f"no seq2seq model for synthetic queries could be loaded from {str(name_or_folder)!r} "
                f"({type(error).__name__}: {error}); give a folder written by save_pretrained or a hub id that can be "
                "reached in generator.doc2query, or set mix.synthetic to 0"
            ) from error
        self.input_tokens, self.output_tokens, self.top_k, self.batch = input_tokens, output_tokens, top_k, batch

    @torch.inference_mode()
    def queries(self, titles: Sequence[str], *, count: int, seed: int) -> list[str]:
        """`count` queries for each title, those of a title together; "" where the model had nothing to say."""
        made, device = [], self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for start in range(0, len(titles), self.batch):
                inputs = self.tokenizer(
                    list(titles[start : start + self.batch]), padding=True, truncation=True, max_length=self.input_tokens,
                    return_tensors="pt",
                )  # fmt: skip
                torch.manual_seed(seed_from(seed, start))
                ids = self.model.generate(
                    input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                    do_sample=True, top_k=self.top_k, num_beams=1, num_return_sequences=count,
                    max_new_tokens=self.output_tokens,
                )  # fmt: skip
                made += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return made
