"""Recipe section: which methods `catid2 reproduce` measures, and with what budgets. None of it changes what other jobs make."""

from typing import Annotated

from pydantic import Field

from catid2_ray.config.section import Section, setting


class ReproduceRecipe(Section):
    """The paper's tables on this catalogue: methods, seeds, and budgets of what only this command trains."""

    methods: tuple[str, ...] = setting(
        (),
        "rows of table 2, one word each (docs/reproduce.md names them); [] = all but those that train "
        "a generator in full",
        unit="names",
        operational=True,
    )
    runs: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")], str] = setting(
        {}, "answers of other searches to the test queries, name: file in TREC's run format; each is a row of table 2",
        unit="files", operational=True,
    )  # fmt: skip
    encoders: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")], str] = setting(
        {}, "further sentence encoders as they are, name: id or folder; each is a row of table 2, and sentence_t5 and mpnet may "
        "name a folder here", unit="models", operational=True,
    )  # fmt: skip
    confidence: dict[str, Annotated[float, Field(ge=0)]] = setting(
        {}, "{COLUMN: LEAST}: the table of category labels gets a row that trains on these labels alone, as "
        "quantizer.category_confidence does", unit="column: least", operational=True,
    )  # fmt: skip
    seeds: int = setting(
        3, "runs of each method that has a seed, from the recipe's seed on", unit="runs", operational=True, ge=1
    )
    printed_epochs: int | None = setting(
        None, "epochs of the quantizers as printed, whose encoders begin at random; none = quantizer.epochs", unit="epochs",
        operational=True, ge=1,
    )  # fmt: skip
    printed_learning_rate: float | None = setting(
        None, "their learning rate; none = quantizer.learning_rate", unit="1/step", operational=True, gt=0
    )
    machine_hour: float | None = setting(
        None, "what an hour of the machine that measures costs; the report then shows money beside seconds", unit="money",
        operational=True, ge=0,
    )  # fmt: skip
    dpr_epochs: int = setting(1, "passes of DPR over the training pairs", unit="epochs", operational=True, ge=1)
    dpr_pairs: int | None = setting(
        None,
        "training pairs that DPR learns from at most, a seeded sample; none = all",
        unit="pairs",
        operational=True,
        ge=2,
    )
    dpr_batch: int = setting(32, "pairs of DPR's batch, each other's negatives", unit="pairs", operational=True, ge=2)
    dpr_learning_rate: float = setting(2e-5, "AdamW's peak", unit="1/step", operational=True, gt=0)
