"""A training step of the generator beside the plain Hugging Face Trainer: same model, rows, batch, precision, one worker.

    pip install accelerate   # which the Trainer needs
    python benchmarks/generator_step.py [--models small,minilm,base] [--encoder FOLDER] [--catalog ROOT] [--out FILE]

Models: `small` (the T5 of the Home Depot recipe), `minilm` (a pretrained text encoder, frozen, and 3 decoder layers; ours with
cached token states and without), `base` (T5-base's shape with random weights). Each measurement is a process of its own:
examples/s over the steps after warm-up, MFU (products of encoder and decoder, forward and backward, against the machine's
best 1024³ product), peak memory. Data: titles and queries of --catalog, else of the generated catalogue. One thread. The last
line printed is JSON.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import finish, in_fresh_process, machine, parser_of, rounded, table

from catid2_ray.docid import DocidSpace
from catid2_ray.evaluation.tables import shown
from catid2_ray.generator.batches import Examples, length_groups
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.step import fit, least_rows
from catid2_ray.generator.vocabulary import (
    load_tokenizer,
    marks,
    starts_word,
    tokenize,
    train_tokenizer,
    with_docid_tokens,
)

SPACE = DocidSpace((256, 256, 256, 256))
BATCH = {"small": 256, "minilm": 256, "base": 32}
MOST_STEPS = {"base": 10}
TOKENS, ROWS = 32, 20_000


def texts_of(catalog: str | None) -> tuple[list[str], list[str]]:
    """Training queries and titles, at most ROWS of each."""
    if catalog:
        import pyarrow.parquet as pq

        pairs = pq.read_table(Path(catalog) / "pairs.parquet")
        titles = pq.read_table(Path(catalog) / "products.parquet", columns=["title"])["title"]
    else:
        from catid2_ray.catalog.synthetic import generate

        catalogue = generate(products=ROWS, queries=4000, seed=1)
        pairs, titles = catalogue.pairs, catalogue.products["title"]
    train = pairs.filter(pairs["split"].combine_chunks().cast("string").to_numpy(zero_copy_only=False) == "train")
    return train["query"].to_pylist()[:ROWS], titles.to_pylist()[:ROWS]


def examples_of(tokenizer, queries: list[str], titles: list[str]) -> Examples:
    rng = np.random.default_rng(0)
    return Examples(
        input_ids={
            "query": tokenize(tokenizer, queries, length=TOKENS), "title": tokenize(tokenizer, titles, length=TOKENS)
        },
        codes={name: rng.integers(0, 256, (len(of), 4)) for name, of in (("query", queries), ("title", titles))},
        starts_word_V=starts_word(tokenizer), **marks(tokenizer)._asdict(),
    )  # fmt: skip


def build(name: str, tokenizer, encoder: str | None):
    if name == "minilm":
        from catid2_ray.generator.encoder_decoder import encoder_decoder

        return encoder_decoder(
            encoder, width=256, layers=3, heads=4, feed_forward=1024, dropout=0.0, codes_per_level=SPACE.codes_per_level
        )
    shape = {"small": (192, 2, 4, 768), "base": (768, 12, 12, 3072)}[name]
    width, layers, heads, feed_forward = shape
    return small_t5(
        vocabulary=len(tokenizer) - sum(SPACE.codes_per_level), width=width, layers=layers, heads=heads,
        feed_forward=feed_forward, dropout=0.0, codes_per_level=SPACE.codes_per_level,
    )  # fmt: skip


def flops(model, name: str, lengths: np.ndarray, cached: bool) -> float:
    """Multiply–adds × 2 of one example's matrix products with weights, forward and (×2) backward, without padding."""

    def weights(module) -> int:
        return sum(
            p.numel() for n, p in module.named_parameters() if p.ndim == 2 and "embed" not in n and "shared" not in n
        )

    per_token = weights(model.encoder.projection if name == "minilm" else model.encoder)
    cross = sum(layer.layer[1].EncDecAttention.k.weight.numel() * 2 for layer in model.decoder.block)
    per_position = weights(model.decoder) - cross
    width = model.config.d_model
    trained = 3 * (lengths.mean() * (per_token + cross) + 4 * per_position + 4 * 256 * width)
    if name == "minilm" and not cached:
        trained += lengths.mean() * weights(model.encoder.text)  # frozen: forward only
    return 2.0 * trained


class Clock:
    """Times the steps after `warm` of them: by the clock, and by this process's one thread, since others may be at work here."""

    def __init__(self, warm: int):
        self.warm, self.ends = warm, []

    def __call__(self, *_) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    @property
    def seconds_S2(self) -> np.ndarray:
        """Of each step: of the clock, of the processor."""
        return np.diff(self.ends[self.warm - 1 :], axis=0)


class Prepared:
    """The batches of the first steps, made beforehand: what the same steps cost without any data work."""

    def __init__(self, examples, steps: int, batch: int):
        self.rows = [examples.batch(seed=0, step=step, batch=batch) for step in range(steps)]

    def batch(self, *, step: int, **_):
        return self.rows[step]


def trainer(model, examples: Examples, name: str, steps: int, clock: Clock) -> None:
    """The plain way: rows as lists, padded by the collator to the longest, loss over the whole vocabulary."""
    import transformers

    first = model.lm_head.weight.shape[0] - sum(SPACE.codes_per_level)
    offset_L = first + np.concatenate([[0], np.cumsum(SPACE.codes_per_level)[:-1]])

    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            picked = [examples.batch(seed=0, step=step, batch=BATCH[name]) for step in range(steps)]
            self.ids = [row[row != examples.pad].tolist() for part in picked for row in part.texts]
            self.labels = [row for part in picked for row in (part.codes_BL + offset_L).tolist()]

        def __len__(self):
            return len(self.ids)

        def __getitem__(self, row):
            return {"input_ids": self.ids[row], "labels": self.labels[row]}

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        ids_BT = torch.tensor([row["input_ids"] + [examples.pad] * (longest - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids_BT, "attention_mask": ids_BT != examples.pad,
                "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip

    class Plain(torch.nn.Module):
        """The encoder–decoder as one would write it for the Trainer."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, labels):
            memory = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=0)
            hidden = model.decoder(
                input_ids=shifted, encoder_hidden_states=memory, encoder_attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden * model.config.d_model**-0.5)
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH[name], max_steps=steps, learning_rate=1e-3, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        transformers.Trainer(
            model=Plain() if name == "minilm" else model, args=arguments, train_dataset=Rows(), data_collator=collate,
            callbacks=[Watch()],
        ).train()  # fmt: skip


def measure(name: str, way: str, options) -> dict:
    """One process: a model trained one way."""
    torch.set_num_threads(1)
    queries, titles = texts_of(options.catalog)
    if name == "minilm":
        tokenizer = load_tokenizer(options.encoder, kind="encoder_decoder")
    else:
        tokenizer = with_docid_tokens(train_tokenizer([*queries, *titles], size=8000), SPACE)
    examples, steps = examples_of(tokenizer, queries, titles), min(options.steps, MOST_STEPS.get(name, options.steps))
    model, clock = build(name, tokenizer, options.encoder), Clock(max(2, steps // 5))
    rows, figures = examples, {}
    lengths = np.concatenate(
        [examples.batch(seed=0, step=s, batch=BATCH[name]).texts.astype(bool).sum(1) for s in range(4)]
    )
    with tempfile.TemporaryDirectory() as folder:
        if way == "cached":
            began = time.perf_counter()
            rows = examples.with_states(model.encoder, Path(folder) / "states")
            figures["seconds_caching"] = time.perf_counter() - began
        if way == "trainer":
            trainer(model, examples, name, steps, clock)
        else:
            fit(model, rows, space=SPACE, steps=steps, batch=BATCH[name], learning_rate=1e-3, on_step=clock)
            beforehand, prepared = Clock(clock.warm), Prepared(rows, steps, BATCH[name])
            fit(model, prepared, space=SPACE, steps=steps, batch=BATCH[name], learning_rate=1e-3, on_step=beforehand)
            # Step by step the same rows; the median, since a machine that others use has slow moments.
            ratio = float(np.median(clock.seconds_S2[:, 0] / beforehand.seconds_S2[:, 0]))
            figures |= {"beside_prepared": ratio}
            figures["padding"] = {size: padding(examples, model, size) for size in sorted({BATCH[name], 256})}
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    began = time.process_time()
    for _ in range(20):
        a @ b
    peak = 20 * 2 * 1024**3 / (time.process_time() - began)
    seconds = float(clock.seconds_S2[:, 1].mean())
    rate = BATCH[name] / seconds
    return figures | {
        "model": name, "way": way, "batch": BATCH[name], "steps": steps, "seconds_step": seconds,
        "examples_per_second": rate,
        "gflops": rate * flops(model, name, lengths, way == "cached") / 1e9, "machine_gflops": peak / 1e9,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def padding(examples: Examples, model, batch: int) -> dict:
    """Share of padding among the tokens that a step computes on, with rows as they come and in groups of like length."""
    real = whole = grouped = 0
    for step in range(20):
        length_B = (examples.batch(seed=0, step=step, batch=batch).texts != examples.pad).sum(1)
        real, whole = real + length_B.sum(), whole + length_B.max() * len(length_B)
        grouped += sum(length_B[part].max() * len(part) for part in length_groups(length_B, least=least_rows(model)))
    return {"as they come": 1 - real / whole, "grouped": 1 - real / grouped}


def report(rows: list[dict], options) -> str:
    # Of one machine: its rate varies between processes by a quarter, and each row's own would set like steps apart.
    peak = max(row["machine_gflops"] for row in rows)
    rivals = {row["model"]: row["examples_per_second"] for row in rows if row["way"] == "trainer"}
    data = "Home Depot" if options.catalog else "generated"
    names = ["model", "parameters", "way", "batch", "steps", "s a step", "examples/s", "beside the Trainer"]
    names += ["real data ÷ batches made before", "MFU", "peak memory"]
    steps = [
        [row["model"], f"{row['parameters'] / 1e6:.1f} M",
         row["way"] + (f" ({row['seconds_caching']:.0f} s caching)" if "seconds_caching" in row else ""),
         row["batch"], row["steps"], f"{row['seconds_step']:.3f}", f"{row['examples_per_second']:.1f}",
         f"{row['examples_per_second'] / rivals[row['model']]:.2f} ×" if row["model"] in rivals else None,
         shown(row.get("beside_prepared"), ".3f"), f"{row['gflops'] / peak:.0%}", f"{row['peak_memory_gib']:.2f} GiB"]
        for row in rows
    ]  # fmt: skip
    padded = [
        [f"{row['model']}, {size} rows", f"{shares['as they come']:.1%}", f"{shares['grouped']:.1%}"]
        for row in rows if row["way"] == "ours" for size, shares in row["padding"].items()
    ]  # fmt: skip
    return (
        "# A training step of the generator\n\n"
        "Written by `benchmarks/generator_step.py`. A fifth of the steps, at least two, are warm-up; float32, AdamW, clipping; one "
        f"process a measurement, one thread, whose processor time is taken. Data: {data} queries and titles, at most {TOKENS} "
        "tokens, half of the titles thinned. *trainer*: `transformers.Trainer` on the same model and rows, padded to the "
        "longest, loss over the whole vocabulary. *ours*: `generator.fit`. *cached*: the frozen encoder's states read from disk "
        "(computing them once is `caching`; they are in the page cache, so no disk is waited for). Real data ÷ batches made "
        "before: by the clock, the same rows step by step, the median. MFU: products without padding ÷ the best rate of a 1024³ "
        f"product in any process, {peak:.0f} GFLOP/s. Machine: {machine()}.\n\n"
        + table(names, steps) + "\n" + table(["model", "padding as rows come", "in groups of like length"], padded)
    )  # fmt: skip


WAYS = {"small": ("ours", "trainer"), "minilm": ("cached", "ours", "trainer"), "base": ("ours", "trainer")}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default="small,minilm,base")
    parser.add_argument("--encoder", help="folder of a sentence encoder, for minilm")
    parser.add_argument("--catalog", help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(rounded(measure(*options.one.split(":"), options))))
        return
    names = [name for name in options.models.split(",") if name != "minilm" or options.encoder]
    rows = []
    for name in names:
        for way in WAYS[name]:
            rows.append(in_fresh_process(__file__, *sys.argv[1:], "--one", f"{name}:{way}"))
            print(rows[-1], file=sys.stderr, flush=True)
    finish({"rows": rows}, lambda figures: report(figures["rows"], options), options)


if __name__ == "__main__":
    main()
