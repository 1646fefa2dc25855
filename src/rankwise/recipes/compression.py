"""`Recipe`: a whole run as one validated object, in Python or as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rankwise.allocation import AnyAllocation, Spectral, Uniform, allocation_from
from rankwise.data import require_files
from rankwise.errors import nearest
from rankwise.evaluation import ObjectiveSettings
from rankwise.methods import AnyMethod, TwoSided, method_class, method_named
from rankwise.recipes.texts import Calibration, Evaluation, Validation
from rankwise.recipes.values import (
    LOW_RANK,
    FilePath,
    HeadText,
    Length,
    ModelName,
    Node,
    Pattern,
    Seed,
    SourceText,
)
from rankwise.repair import Blocks, FullFactors, Lora, Refit, Subspace
from rankwise.sizes import SPELLINGS, Budget, Plan

_HEAD_KEEP = 0.5
"""Fraction of its numbers that a low-rank head keeps where neither it nor the budget says one."""

STEPS = ("refit", "blocks", "subspace", "factors", "lora")


class Repair(Node):
    """What is done to the factors after they are in place.

    Attributes:
        steps: any of `refit`, `blocks`, `subspace`, `factors`, `lora`; they run in this order, each a stage.
        refit: closed form, block by block.
        blocks: the factors of one block after another trained to give the original's output.
        subspace: two diagonals a site (Bolaco, Eq. 9), trained and merged.
        factors: all factors trained together.
        lora: adapters trained beside the factors, or the weights of what lost units alone, and merged into them.
        data: text that `subspace`, `factors` and `lora` learn from, `alpaca:FILE.jsonl` for instructions; None takes
            the calibration sequences.
        output_only: learn from the outputs of instructions alone.
        length: most tokens an example; None as for calibration.
    """

    steps: tuple[Literal["refit", "blocks", "subspace", "factors", "lora"], ...] = ()
    refit: Refit = Refit()
    blocks: Blocks = Blocks()
    subspace: Subspace = Subspace()
    factors: FullFactors = FullFactors()
    lora: Lora = Lora()
    data: SourceText | None = None
    output_only: bool = False
    length: Length | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        if value is None:
            return ()
        if not isinstance(value, str | list | tuple):
            raise ValueError("repairs are named in a list, or joined by commas")
        names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        for name in names:
            if name not in STEPS:
                raise ValueError(f"there is no repair {name!r}; {nearest(str(name)[:80], STEPS)}")
        if len(set(names)) < len(names):
            raise ValueError("a repair is named twice")
        return sorted(names, key=STEPS.index)

    @model_validator(mode="after")
    def _adapters_keep_ranks(self) -> Repair:
        if "lora" in self.steps and self.lora.merge == "grow":
            raise ValueError(
                "adapters that raise ranks (repair.lora.merge grow) make the model larger than was asked: give "
                "truncate, or rankwise finetune DIR --method lora --merge grow"
            )
        return self


class Recipe(Node):
    """Everything a compression depends on.

    Attributes:
        model: directory or hub name of the checkpoint.
        output: directory to write; None keeps the result in memory only.
        include: glob patterns over names of linear weights in the decoder's blocks, such as `*.mlp.*`; those that match
            one are compressed, all of them where none is given.
        exclude: likewise; those that match one stay as they are, whatever `include` says. A budget of `keep` or `bits`
            is of all of them, left out or not.
        method: how a weight is fitted; where none is given `two_sided`, and `quantize` for a budget of bits.
        embeddings: `8bit` stores them as 8-bit integers with a scale a row; where the head is tied to them, both.
        head: `8bit` stores it likewise; where it is tied to the embeddings, both. `low-rank:0.6` stores two factors
            with that fraction of its numbers, `low-rank` with the fraction that `budget.keep` says, one half where it
            says none. A budget of `keep` or `bits` counts neither embeddings nor head, one of `size` counts both as
            they are stored.
        allocation: how size is spread over sites. When it is not given: `spectral` for methods whose
            losses are in one unit at every site (`two_sided`; the others that quantise on a budget), else `uniform`.
        budget: how much is kept.
        calibration: text for statistics.
        validation: text on which a search judges its plans.
        objective: how it judges them.
        repair: what is done to the factors after they are in place.
        evaluation: text to score before and after, or None.
        format: `low_rank` writes factors; `dense` multiplies them back into a checkpoint of the original type, which
            saves no space.
        max_shard_size: size at which weights are split over files.
        precision: `auto` computes in float32 on a CPU and in the checkpoint's dtype on a GPU; `stored`; `float32`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        memory: `whole` holds the model in memory; `blocks` leaves weights in files and casts and moves one block at a
            time; `disk` keeps hidden states between blocks in files too. All give the same result. `auto` takes the
            first of them that an estimate says fits.
        executor: `here` does all in this process; `ray` and `ray:ADDRESS` have workers measure, look, fit and judge, on
            this machine or on a cluster.
        workers: how many; None takes one a GPU where there are GPUs, else one a machine, and two on a single one.
        seed: for everything drawn.
        trust_remote_code: run code that the checkpoint ships.
    """

    model: ModelName
    output: FilePath | None = None
    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    method: AnyMethod = TwoSided()
    embeddings: Literal["8bit"] | None = None
    head: HeadText | None = None
    allocation: AnyAllocation = Spectral()
    budget: Budget = Budget(keep=0.8)
    calibration: Calibration = Calibration()
    validation: Validation = Validation()
    objective: ObjectiveSettings = ObjectiveSettings()
    repair: Repair = Repair()
    evaluation: Evaluation | None = None
    format: Literal["low_rank", "dense"] = "low_rank"
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*[KMGT]B$")] = "5GB"
    precision: Literal["auto", "stored", "float32"] = "auto"
    device: str = "auto"
    memory: Literal["auto", "whole", "blocks", "disk"] = "auto"
    executor: Annotated[str, Field(pattern=r"^(here|ray(:\S+)?)$")] = "here"
    workers: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0
    trust_remote_code: bool = False

    @property
    def plan_file(self) -> str | None:
        """The plan that the allocation takes over or starts from; None without one."""
        key = {"plan": "file", "bayesian": "plan"}.get(self.allocation.name)
        return None if key is None else getattr(self.allocation, key)

    @property
    def judges(self) -> bool:
        """Whether validation samples are needed: for a search, or to judge a repair."""
        return self.allocation.searches or bool(self.repair.steps)

    @property
    def head_keep(self) -> float | None:
        """Fraction of the head's numbers that two factors in its place have; None where it stays one matrix."""
        form, _, kept = (self.head or "").partition(":")
        if form != LOW_RANK:
            return None
        return float(kept) if kept else (self.budget.keep or _HEAD_KEEP)

    def require_files(self) -> None:
        """Raise when a text or a plan that is a file is not there, before anything slow.

        Raises:
            DataError: naming the file of a text.
            BudgetError: naming the plan.
        """
        scored = None if self.evaluation is None else self.evaluation.source
        require_files(self.calibration.source, self.validation.source, scored, self.repair.data)
        if (plan := self.plan_file) is not None:
            Plan.load(Path(plan))

    @model_validator(mode="after")
    def _size_for_method(self) -> Recipe:
        self.method.check_size(self.budget, self.allocation.name)
        if self.workers is not None and self.executor == "here":
            raise ValueError("workers are given, and the executor is this process: add executor ray")
        if self.executor != "here" and self.method.prunes:
            raise ValueError(f"{self.method.name} takes units out of a model in one process: leave executor away")
        if self.method.prunes and self.judges and self.validation.select in ("top", "bottom"):
            raise ValueError(
                f"validation.select {self.validation.select} tries plans of one model, and {self.method.name} makes it "
                "another: give all or random"
            )
        if (self.include or self.exclude) and not self.method.by_site:
            raise ValueError(
                f"{self.method.name} cuts the residual stream, which all linear weights read or write: none of them "
                "can be left out by include or exclude"
            )
        if self.repair.steps:
            self._check_repair()
        return self

    def _check_repair(self) -> None:
        """Raise when a repair is asked for that what the method leaves cannot have."""
        steps, method = set(self.repair.steps), self.method
        if method.prunes and not method.keeps_factors:
            if not method.by_site or steps != {"lora"}:
                takes = "lora alone" if method.by_site else "none"
                raise ValueError(f"{method.name} leaves no factors to repair; of repairs it takes {takes}")
        elif not method.repairable:
            made = f"which {method.name} makes, as does a size in bits without a method"
            raise ValueError(
                f"no repair knows codes, {made}; rankwise finetune --method lowrank learns L R beside them"
            )
        if "lora" in steps and method.prunes and self.repair.lora.loss == "kl":
            raise ValueError(
                f"{method.name} leaves nothing of the original for adapters to learn from: give repair.lora.loss lm, "
                "or rankwise finetune DIR --method lora --loss kl"
            )

    @model_validator(mode="after")
    def _vocabulary_for_method(self) -> Recipe:
        if self.head_keep is not None and not self.method.by_site:
            raise ValueError(f"{self.method.name} cuts the head itself: leave head low-rank away, or give 8bit")
        if self.head_keep == 1:
            raise ValueError("two factors of a head that keeps all have no less numbers: write head low-rank:0.6")
        if (self.embeddings or self.head) and self.budget.size is not None and not self.method.by_site:
            raise ValueError(
                f"{self.method.name} cuts embeddings and head itself, and chooses its width for numbers: with "
                "embeddings or head in 8 bits give keep or bits, not size"
            )
        return self

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return method_named(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, values: Any) -> Any:
        """The method of a size in bits, and the size and the allocation of a method, where none is given."""
        if not isinstance(values, Mapping):
            return values
        # A key with nothing behind it, as YAML allows, says nothing.
        values = {key: value for key, value in values.items() if value is not None}
        given = values.get("budget", {})
        if not isinstance(given, Mapping | BaseModel):
            return values
        budget = dict(given) if isinstance(given, Mapping) else given.model_dump(exclude_unset=True)
        if "method" not in values and budget.get("bits") is not None:
            # Ranks alone that take so little leave no model; codes do.
            values["method"] = "quantize"
        method = values.get("method", TwoSided())
        named = method.get("name") if isinstance(method, Mapping) else getattr(method, "name", None)
        name = method if isinstance(method, str) else named
        kind = method_class(name)
        if kind is None:
            return values
        sized = any(budget.get(spelling) is not None for spelling in SPELLINGS)
        # A keep of null says that the size is given otherwise, or by hand.
        if not sized and "keep" not in budget and kind.default_keep is not None:
            budget["keep"] = kind.default_keep
        values = {**values, "budget": budget}
        if follows := kind.defaults(budget):
            given = method.model_dump(exclude_unset=True) if isinstance(method, BaseModel) else method
            values["method"] = {**follows, **(given if isinstance(given, Mapping) else {}), "name": name}
        if "allocation" not in values:
            # Where nothing says a size, there is nothing to spend.
            spends = sized or kind.default_keep is not None
            values["allocation"] = Spectral() if kind.one_unit and spends else Uniform()
        return values

    @field_validator("allocation", mode="before")
    @classmethod
    def _allocation_by_name(cls, value: Any) -> Any:
        return allocation_from(value) if isinstance(value, str) else value
