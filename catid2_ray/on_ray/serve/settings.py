"""Arguments of the application, as in serve_config.yaml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AppSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    store: str = Field(description="folder or s3:// prefix of the store")
    release: str | None = Field(
        None, description="name of a release, which is served until the deployment changes; null = the current one"
    )
    follow: bool = Field(
        True,
        description="where `release` is null: true = replicas change to every release that becomes current; false = they keep the "
        "one that was current when the application was deployed",
    )
    threads: int = Field(1, ge=1, description="torch threads of a replica")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the generator and the query encoder run; cuda: each replica asks Ray for a GPU"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="numbers of the generator")
    weights: Literal["float32", "int8"] | None = Field(None, description="null = as the release was evaluated")
    normalize: Literal["level", "vocabulary", "trie"] | None = Field(
        None, description="null = as the release was evaluated"
    )
    updates: bool | None = Field(
        None,
        description="take changes of products; null = only where there are keys with the right to write",
    )
    keys: str | None = Field(
        None,
        description="file with one key a line, `read KEY` or `write KEY`, on every node; null = the environment variable "
        "CATID2_KEYS, which holds the same lines; without either everybody may read",
    )
    needs_keys: bool = Field(
        False,
        description="a replica that finds no keys on its node does not start; sets itself where the application is built with keys",
    )
    logs: Literal["text", "json"] = Field(
        "text", description="how a replica writes its log: key=value, or JSON, one event a line"
    )
    poll_s: float = Field(1.0, gt=0, description="seconds between looks for changes that other replicas took")
    follow_s: float = Field(5.0, gt=0, description="seconds between looks for a release that became current")

    @property
    def follows(self) -> bool:
        return self.release is None and self.follow

    @property
    def other_numbers(self) -> bool:
        """Whether scores are made in another way than when the release was evaluated."""
        return self.dtype != "float32" or self.weights is not None or self.normalize is not None
