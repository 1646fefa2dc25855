"""`FineTune`: a fine-tuning of a compressed checkpoint as one validated object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rankwise.data import Start
from rankwise.errors import RecipeError, nearest
from rankwise.recipes.reading import explained
from rankwise.recipes.values import Count, FilePath, Length, ModelName, Seed, SourceText
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
        bos: whether examples and texts begin with the tokenizer's start token, as for calibration.
        seed: for the order of examples.
        device: `auto`, `cpu`, `cuda`, ...
        precision: as in a recipe.
        trust_remote_code: run code that the original ships.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: ModelName
    data: SourceText
    output: FilePath
    method: Literal["subspace", "lora", "full-factors", "lowrank"] = "full-factors"
    settings: Subspace | Lora | FullFactors | LowRankFactors | None = None
    length: Length | None = None
    output_only: bool = False
    original: ModelName | None = None
    held_out: Count = 16
    evaluation: SourceText | None = None
    bos: Start = "auto"
    seed: Seed = 0
    device: str = "auto"
    precision: Literal["auto", "stored", "float32"] = "auto"
    trust_remote_code: bool = False

    @property
    def training(self) -> Subspace | Lora | FullFactors | LowRankFactors:
        """The settings that hold."""
        return self.settings or TRAININGS[self.method]()

    @model_validator(mode="after")
    def _settings_of_method(self) -> FineTune:
        if type(self.training) is not TRAININGS[self.method]:
            raise ValueError(f"the settings are not those of {self.method}")
        return self


def finetune_from(values: Mapping[str, Any], settings: Mapping[str, Any], origin: str = "finetune") -> FineTune:
    """Validate.

    Args:
        values: attributes of `FineTune` but for its settings.
        settings: of its method.
        origin: for errors.

    Raises:
        RecipeError: naming the key, and the nearest known one for a key that is unknown.
    """
    method = values.get("method", FineTune.model_fields["method"].default)
    if not isinstance(method, str) or method not in TRAININGS:
        raise RecipeError(
            f"There is no method {method!r}.", where="--method", remedy=nearest(str(method)[:80], TRAININGS)
        )
    known = TRAININGS[method].model_fields
    for key in settings:
        if key not in known:
            raise RecipeError(f"{method} has no setting {key!r}.", where=origin, remedy=nearest(key[:80], known))
    try:
        return FineTune.model_validate({**values, "settings": TRAININGS[method].model_validate(dict(settings))})
    except ValidationError as problem:
        raise explained(problem, origin, known=lambda place: list(FineTune.model_fields)) from None
