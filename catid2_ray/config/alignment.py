"""Recipe section: alignment of the generator by reinforcement (EG-GRPO of CQ-SID, arXiv 2605.14434)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from catid2_ray.config.section import TrainingRecipe, setting

_CQ_SID = "EG-GRPO of CQ-SID (2605.14434)"
_OURS = "not in CQ-SID; ours"


class AlignmentRecipe(TrainingRecipe):
    """After the generator; off by default. The result is a generator again, made from the one that training gave."""

    enabled: bool = setting(
        False, "align the generator before it is evaluated and published", unit="yes/no", paper=_CQ_SID
    )
    steps: int = setting(200, "updates in all", unit="steps", paper=f"{_CQ_SID}: 1,000", ge=1)
    report_every: int = setting(
        50, "updates per block: after each a line of history, and checkpoints count in blocks", unit="steps",
        paper=_OURS, ge=1,
    )  # fmt: skip
    updates: int = setting(
        1, "updates on one rollout; above 1 the ratio leaves 1 and clipping acts", unit="updates",
        paper=f"{_CQ_SID}: not stated", ge=1,
    )  # fmt: skip
    batch: int = setting(
        64, "queries of one rollout, all workers together", unit="queries", paper=f"{_CQ_SID}: 512", ge=1
    )
    learning_rate: float | None = setting(
        None, "AdamW's peak, after which it follows `decay`; none = a fortieth of that of the generator's last stage, which is "
        "how CQ-SID's 1e-6 stands to its 4e-5 before, and suits small models", unit="1/step", paper=f"{_CQ_SID}: 1e-6", gt=0,
    )  # fmt: skip
    group: int = setting(8, "G: distinct valid IDs rolled out per query", unit="IDs", paper=_CQ_SID, ge=2, le=1024)
    rollout: Literal["sample", "beam"] = setting(
        "sample", "a draw without replacement through the trie, or the best of the constrained beam", unit="choice",
        paper=f"{_CQ_SID}: sampled; beam in MiniOneRec",
    )  # fmt: skip
    beam_width: int = setting(32, "beams of rollout: beam", unit="beams", paper=_OURS, ge=1, le=4096)
    temperature: float = setting(
        1.0, "divides the logits of rollout: sample; above 1 explores more", unit="ratio", paper=f"{_CQ_SID}: not stated",
        gt=0, le=100,
    )  # fmt: skip
    term: Literal["policy", "pairs"] = setting(
        "policy", "policy: EG-GRPO's clipped ratio times the advantage; pairs: in a group, what has more reward is preferred to "
        "what has less (DPO)", unit="choice", paper="DDRO (2504.05181): pairs", later=True,
    )  # fmt: skip
    beta: float = setting(0.1, "β of term pairs", unit="1/nats", paper="DPO (2305.18290): 0.1", gt=0, later=True)
    injected: int = setting(
        2,
        "k: ground-truth IDs put into each group; 0 = plain GRPO",
        unit="IDs",
        paper=f"{_CQ_SID}: 0, 2, 4",
        ge=0,
        le=256,
    )
    group_form: Literal["widened", "fixed"] = setting(
        "widened", "G + k members, or experts in the place of the last k rollouts", unit="choice",
        paper=f"{_CQ_SID}: accounts differ",
    )  # fmt: skip
    expert_term: Literal["policy", "sft"] = setting(
        "policy", "experts in the policy term as any member, or −log π in its stead; they count in the group's mean in both",
        unit="choice", paper=f"{_CQ_SID}: policy",
    )  # fmt: skip
    expert_weight: float = setting(1.0, "weight of −log π where expert_term is sft", unit="weight", paper=_OURS, ge=0)
    expert_cap: float | None = setting(
        1.0, "largest advantage of an expert less likely than every rollout of its group; none = no cap",
        unit="standard deviations", paper=_OURS, gt=0,
    )  # fmt: skip
    expert_min_reward: float = setting(
        0.5, "judged IDs of at least this reward are ground truth", unit="reward", paper=f"{_CQ_SID}: clicked or exposed",
        ge=-10, le=10,
    )  # fmt: skip
    ratio: Literal["token", "sequence"] = setting(
        "token", "the clipped ratio is of each level, or of the whole ID", unit="choice", paper=f"{_CQ_SID}: not stated"
    )
    clip_ratio: float = setting(0.2, "PPO: the ratio counts within 1 ± this", unit="ratio", paper=_CQ_SID, gt=0, lt=1)
    kl: Literal["exact", "k3"] = setting(
        "exact", "KL to the generator before, per level over all its codes, or estimated from the code taken",
        unit="choice", paper=f"{_CQ_SID}: not stated",
    )  # fmt: skip
    kl_weight: float = setting(1.0, "weight of that KL", unit="weight", paper=_CQ_SID, ge=0)
    paid: float = setting(
        1.0, "reward of a product that was bought for the query", unit="reward", paper=_CQ_SID, ge=-10, le=10
    )
    clicked: float = setting(1.0, "… that was clicked", unit="reward", paper=_CQ_SID, ge=-10, le=10)
    exposed: float = setting(0.5, "… that was shown", unit="reward", paper=_CQ_SID, ge=-10, le=10)
    valid: float = setting(0.1, "… of which nothing is known", unit="reward", paper=_CQ_SID, ge=-10, le=10)
    invalid: float = setting(0.0, "reward of an ID that no product has", unit="reward", paper=_CQ_SID, ge=-10, le=10)
    grades: (
        tuple[tuple[Annotated[float, Field(ge=-1e6)], Annotated[float, Field(ge=-10, le=10)]], ...] | None
    ) = setting(
        None, "[relevance, reward] pairs by rising relevance, straight lines between, where pairs have no behaviour; "
        "none = (relevance − min) / (max − min)", unit="grade, reward", paper=_OURS,
    )  # fmt: skip
    judged_max: int = setting(
        64, "judged IDs, and IDs with a ranker's score, kept per query, best first", unit="IDs", paper=_OURS, ge=1, le=4096,
    )  # fmt: skip
    ranker: str | None = setting(
        None, "a downstream ranker as module:function, called as function(query, product_ids) → scores; the environment variable "
        "CATID2_RANKERS must list it, since it is imported", unit="name",
        paper=_OURS, min_length=3,
    )  # fmt: skip
    ranker_scores: str | None = setting(
        None, "or its scores as a parquet file (query_id, product_id, score), held in memory by each actor", unit="URI",
        paper=_OURS, min_length=1,
    )  # fmt: skip
    ranker_bonus: float = setting(
        0.2, "bound of its bonus: this · tanh(z), z the positive deviation from the group in standard deviations",
        unit="reward", paper="VARG (2609.14493): 0.2", ge=0, le=10,
    )  # fmt: skip
    validation_queries: int = setting(
        500, "queries of the validation split (of training, where there are none) measured before and after",
        unit="queries", paper=_OURS, ge=1, le=20_000,
    )  # fmt: skip

    @property
    def epochs(self) -> int:
        """The training loop counts in blocks of `report_every` updates."""
        return self.steps // self.report_every

    @model_validator(mode="after")
    def _consistent(self):
        if self.group_form == "fixed" and self.injected >= self.group:
            raise ValueError(
                f"injected {self.injected} fills a fixed group of {self.group}: at least one rollout must stay. Lower injected, "
                "raise group, or set group_form to widened"
            )
        for name, whole in (("steps", "report_every"), ("report_every", "updates")):
            if getattr(self, name) % getattr(self, whole):
                raise ValueError(
                    f"{name} {getattr(self, name)} does not divide by {whole} {getattr(self, whole)}: choose a multiple"
                )
        if self.checkpoint_every_steps and self.checkpoint_every_steps % self.updates:
            raise ValueError(
                f"checkpoint_every_steps {self.checkpoint_every_steps} does not divide by updates {self.updates}: a run that "
                "resumes between the updates of a rollout would roll out anew; choose a multiple"
            )
        if self.ranker and self.ranker_scores:
            raise ValueError("ranker and ranker_scores are both set: one ranker gives the bonus, so drop one of them")
        if self.ranker and ":" not in self.ranker:
            raise ValueError(f"ranker {self.ranker!r} is not of the form module:function, such as shop.rank:scores")
        if self.grades is not None and any(a[0] >= b[0] for a, b in zip(self.grades, self.grades[1:])):
            raise ValueError(f"grades must rise in relevance, found {[list(pair) for pair in self.grades]}")
        if self.grades is not None and not self.grades:
            raise ValueError("grades is empty: name at least one [relevance, reward], or leave it out")
        return self
