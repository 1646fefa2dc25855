"""`FineTune`: a fine-tuning of a compressed checkpoint as one validated object."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rankwise.data import parse_source
from rankwise.errors import RankwiseError
from rankwise.repair import FullFactors, Lora, LowRankFactors, Subspace

TRAININGS: dict[str, type[Subspace | Lora | FullFactors | LowRankFactors]] = {
    "subspace": Subspace,
    "lora": Lora,
    "full-factors": FullFactors,
    "lowrank": LowRankFactors,
}


class FineTune(BaseModel):
    """A fine-tuning of a compressed checkpoint.

    Attributes:
        model: directory that rankwise wrote.
        data: text source; `alpaca:FILE.jsonl` for instructions.
        output: directory to write.
        method: `subspace`, `lora` or `full-factors`; `lowrank` for a quantised model.
        settings: of the method; None for its defaults.
        length: most tokens an example; None means the smaller of 512 and the model's context.
        output_only: learn from the outputs of instructions alone.
        original: the model that was compressed, for the loss `kl`; None takes the one the report names.
        held_out: examples at the end that are not learned from: what is trained is judged on them.
        evaluation: text source to score before and after.
        seed: for the order of examples.
        device: `auto`, `cpu`, `cuda`, ...
        precision: as in a recipe.
        trust_remote_code: run code that the original ships.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: str
    output: str
    method: Literal["subspace", "lora", "full-factors", "lowrank"] = "full-factors"
    settings: Subspace | Lora | FullFactors | LowRankFactors | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    output_only: bool = False
    original: str | None = None
    held_out: Annotated[int, Field(ge=1)] = 16
    evaluation: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "stored", "float32"] = "auto"
    trust_remote_code: bool = False

    @property
    def training(self) -> Subspace | Lora | FullFactors | LowRankFactors:
        """The settings that hold."""
        return self.settings or TRAININGS[self.method]()

    @field_validator("data", "evaluation")
    @classmethod
    def _source(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parse_source(text)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy or ''}".strip()) from None
        return text

    @model_validator(mode="after")
    def _settings_of_method(self) -> FineTune:
        if type(self.training) is not TRAININGS[self.method]:
            raise ValueError(f"the settings are not those of {self.method}")
        return self
