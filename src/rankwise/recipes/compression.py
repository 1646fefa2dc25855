"""`Recipe`: a whole run as one validated object, in Python or as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rankwise.allocation import ALLOCATIONS, AnyAllocation, Spectral, Uniform, allocation_from
from rankwise.data import parse_source
from rankwise.errors import RankwiseError, RecipeError, nearest
from rankwise.evaluation import ObjectiveSettings
from rankwise.methods import METHODS, AnyMethod, TwoSided, method_named
from rankwise.repair import Blocks, FullFactors, Refit, Subspace
from rankwise.sizes import SPELLINGS, Budget


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_source(text: str) -> str:
    try:
        parse_source(text)
    except RankwiseError as problem:
        raise ValueError(f"{problem.problem} {problem.remedy or ''}".strip()) from None
    return text


class Calibration(_Node):
    """The text whose statistics steer the factorisation.

    Attributes:
        source: see `rankwise.data.sources` for the grammar.
        sequences: how many; None for all.
        length: tokens a sequence; None means the smaller of 512 and the model's context, and for a `tokens:` source of
            shape `[sequences, tokens]` its own.
        sample: `random` draws sequences by the recipe's seed, `first` takes them from the start.
        batch_size: sequences a batch.
    """

    source: str = "bundled"
    sequences: Annotated[int, Field(ge=1)] | None = 256
    length: Annotated[int, Field(ge=2)] | None = None
    sample: Literal["random", "first"] = "random"
    batch_size: Annotated[int, Field(ge=1)] = 8

    _source = field_validator("source")(_checked_source)


class Evaluation(_Node):
    """Text on which dense and compressed model are scored after compression.

    Attributes:
        source: as for calibration.
        skip: sequences skipped at the start.
        sequences: how many; None for all.
        sample: `first` takes them from the start, `random` draws them by `seed`.
        seed: for drawing.
        length: as for calibration.
        stride: tokens from window to window; None for no overlap.
        batch_size: windows a batch.
    """

    source: str
    skip: Annotated[int, Field(ge=0)] = 0
    sequences: Annotated[int, Field(ge=1)] | None = None
    sample: Literal["random", "first"] = "first"
    seed: int = 0
    length: Annotated[int, Field(ge=2)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8

    _source = field_validator("source")(_checked_source)


class Validation(_Node):
    """Samples on which a search judges its plans.

    Attributes:
        source: as for calibration. None takes sequences of the calibration source that calibration did not use.
        skip: sequences skipped at the start.
        sequences: how many are read; None for all.
        sample: `random` draws them by the recipe's seed, `first` takes them from the start.
        length: as for calibration.
        batch_size: sequences a batch.
        select: which of those read are used: `all`, or `count` of them: `random`, or the `top` or `bottom` by how much
            their perplexity varies over random plans (Bolaco, section 3.2).
        count: for `random`, `top` and `bottom`.
        plans: random plans for `top` and `bottom`; each costs one forward pass over all that is read.
    """

    source: str | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    sequences: Annotated[int, Field(ge=1)] | None = 32
    sample: Literal["random", "first"] = "random"
    length: Annotated[int, Field(ge=2)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    select: Literal["all", "random", "top", "bottom"] = "all"
    count: Annotated[int, Field(ge=1)] = 32
    plans: Annotated[int, Field(ge=2)] = 20

    @field_validator("source")
    @classmethod
    def _source(cls, text: str | None) -> str | None:
        return None if text is None else _checked_source(text)


STEPS = ("refit", "blocks", "subspace", "factors")


class Repair(_Node):
    """What is done to the factors after they are in place.

    Attributes:
        steps: any of `refit`, `blocks`, `subspace`, `factors`; they run in this order, each a stage.
        refit: closed form, block by block.
        blocks: the factors of one block after another trained to give the original's output.
        subspace: two diagonals a site (Bolaco, Eq. 9), trained and merged.
        factors: all factors trained together.
        data: text that `subspace` and `factors` learn from, `alpaca:FILE.jsonl` for instructions; None takes the
            calibration sequences.
        output_only: learn from the outputs of instructions alone.
        length: most tokens an example; None as for calibration.
    """

    steps: tuple[Literal["refit", "blocks", "subspace", "factors"], ...] = ()
    refit: Refit = Refit()
    blocks: Blocks = Blocks()
    subspace: Subspace = Subspace()
    factors: FullFactors = FullFactors()
    data: str | None = None
    output_only: bool = False
    length: Annotated[int, Field(ge=2)] | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        for name in names:
            if name not in STEPS:
                raise ValueError(f"there is no repair {name!r}; {nearest(str(name), STEPS)}")
        if len(set(names)) < len(names):
            raise ValueError("a repair is named twice")
        return sorted(names, key=STEPS.index)

    @field_validator("data")
    @classmethod
    def _data(cls, text: str | None) -> str | None:
        return None if text is None else _checked_source(text)


class Recipe(_Node):
    """Everything a compression depends on.

    Attributes:
        model: directory or hub name of the checkpoint.
        output: directory to write; None keeps the result in memory only.
        method: how a weight is fitted.
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
        seed: for everything drawn.
        trust_remote_code: run code that the checkpoint ships.
    """

    model: str
    output: str | None = None
    method: AnyMethod = TwoSided()
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
    seed: int = 0
    trust_remote_code: bool = False

    @property
    def judges(self) -> bool:
        """Whether validation samples are needed: for a search, or to judge a repair."""
        return self.allocation.searches or bool(self.repair.steps)

    @model_validator(mode="after")
    def _size_for_method(self) -> Recipe:
        self.method.check_size(self.budget, self.allocation.name)
        if self.repair.steps and not self.method.keeps_factors:
            raise ValueError(
                f"no repair knows codes: {self.method.name} is followed by rankwise finetune --method lowrank"
            )
        return self

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return method_named(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, values: Any) -> Any:
        """The size and the allocation of a method, where none is given."""
        if not isinstance(values, Mapping):
            return values
        method = values.get("method", TwoSided())
        named = method.get("name") if isinstance(method, Mapping) else getattr(method, "name", None)
        name = method if isinstance(method, str) else named
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None:
            return values
        given = values.get("budget") or {}
        if not isinstance(given, Mapping | BaseModel):
            return values
        budget = dict(given) if isinstance(given, Mapping) else given.model_dump(exclude_unset=True)
        sized = any(budget.get(spelling) is not None for spelling in SPELLINGS)
        # A keep of null says that the size is given otherwise, or by hand.
        if not sized and "keep" not in budget and kind.default_keep is not None:
            budget["keep"] = kind.default_keep
        values = {**values, "budget": budget}
        if values.get("allocation") is None:
            # Where nothing says a size, there is nothing to spend.
            spends = sized or kind.default_keep is not None
            values["allocation"] = Spectral() if kind.one_unit and spends else Uniform()
        return values

    @field_validator("allocation", mode="before")
    @classmethod
    def _allocation_by_name(cls, value: Any) -> Any:
        return allocation_from(value) if isinstance(value, str) else value


_NODES: dict[str, Any] = {
    "budget": Budget,
    "calibration": Calibration,
    "validation": Validation,
    "objective": ObjectiveSettings,
    "repair": Repair,
    "evaluation": Evaluation,
}


def _known_keys(where: tuple[Any, ...]) -> list[str]:
    """Keys allowed at a place in a recipe."""
    node: Any = Recipe
    for part in where:
        if node is Recipe and part in _NODES:
            node = _NODES[part]
        elif node is Repair and part in STEPS:
            node = Repair.model_fields[part].annotation
        elif part in METHODS:
            node = METHODS[part]
        elif part in ALLOCATIONS:
            node = ALLOCATIONS[part]
    return [key for key in node.model_fields if key != "name" or node is Recipe]


def _explain(problem: ValidationError, origin: str) -> RecipeError:
    """One error for people from pydantic's list: the first problem, its place, and the nearest known key."""
    # A misspelt key explains the required one that is then missing, so it comes first.
    error = min(problem.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = tuple(part for part in error["loc"] if part not in ("name",))
    path = ".".join(str(p) for i, p in enumerate(place) if not (i == 1 and p in {**METHODS, **ALLOCATIONS}))
    where = f"{origin}: {path}" if path else origin
    if error["type"] == "extra_forbidden":
        return RecipeError(
            f"{place[-1]!r} is no key of a recipe.",
            where=where,
            remedy=nearest(str(place[-1]), _known_keys(place[:-1])),
        )
    if error["type"] == "missing":
        return RecipeError(f"{path!r} is missing.", where=origin, remedy=f"add {path}")
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = METHODS if place[0] == "method" else ALLOCATIONS
        given = error["input"].get("name", "") if isinstance(error["input"], dict) else str(error["input"])
        return RecipeError(f"There is no {place[0]} {given!r}.", where=where, remedy=nearest(given, known))
    message = error["msg"].removeprefix("Value error, ")
    given = f" (given: {error['input']!r})" if not isinstance(error["input"], dict) else ""
    return RecipeError(
        f"{path + ': ' if path else ''}{message}{given}.",
        where=where,
        remedy="see rankwise recipes show for a valid recipe",
    )


def recipe_from(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Validate.

    Args:
        values: nested mapping, as YAML gives it.
        origin: file name or such, for errors.

    Raises:
        RecipeError: naming the key, and the nearest known one for a key that is unknown.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as problem:
        raise _explain(problem, origin) from None


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at a dotted path, such as `budget.rank_multiple`, of a nested mapping, in place.

    Raises:
        RecipeError: when the path goes through a plain value.
    """
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if parent in ("method", "allocation"):
            # A method may be given by its name alone, and by none at all when the default is meant.
            child = {"name": child} if isinstance(child, str) else child
            child.setdefault("name", Recipe.model_fields[parent].default.name)
            node[parent] = child
        if not isinstance(child, dict):
            raise RecipeError(f"{parent!r} holds a value, not keys.", where=path, remedy="see rankwise recipes show")
        node = child
    node[leaf] = value


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in a ready recipe given by its name.

    Raises:
        RecipeError: when it cannot be read, naming the nearest ready recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise RecipeError("The recipe cannot be read.", where=name, remedy=str(problem)) from None
    else:
        ready = ready_recipes()
        if name not in ready:
            raise RecipeError(f"There is no ready recipe {name!r}.", where=name, remedy=nearest(name, ready))
        text = ready[name]
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise RecipeError("The recipe is not YAML.", where=name, remedy=" ".join(str(problem).split())) from None
    if not isinstance(values, dict):
        raise RecipeError(
            "The recipe is not a mapping of keys to values.", where=name, remedy="see rankwise recipes show"
        )
    return values


def ready_recipes() -> dict[str, str]:
    """Ready recipes by name, as YAML text."""
    folder = resources.files("rankwise") / "recipes" / "ready"
    return {
        f.name.removesuffix(".yaml"): f.read_text()
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }
