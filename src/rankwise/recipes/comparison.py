"""`Comparison`: several ways to make one model smaller, at several sizes, under one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankwise.errors import RecipeError, nearest
from rankwise.methods import IN_NUMBERS, METHODS, method_class
from rankwise.plugins import in_file
from rankwise.reading import shown
from rankwise.recipes.compression import STEPS, Evaluation, Recipe
from rankwise.recipes.reading import explained, recipe_from
from rankwise.recipes.values import Count, FilePath, ModelName, Seed, SourceText
from rankwise.sizes import parse_size

Spelling = Literal["keep", "bits", "size"]

QUANTISING = tuple(name for name in METHODS if name not in IN_NUMBERS)
"""The methods that take bits."""

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Way(BaseModel):
    """One way to make a model smaller.

    Attributes:
        method: its name.
        allocation: as on the command line; None for the method's own default.
        repair: steps after it.
    """

    model_config = _FROZEN

    method: str
    allocation: str | None = None
    repair: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Way:
        """Read `METHOD[/ALLOCATION][+STEP...]`, such as `two_sided/spectral+blocks`.

        Raises:
            RecipeError: when a part is not known.
        """
        named, slash, behind = text.partition("/")
        if named.strip() in METHODS:
            method, (allocation, steps) = named, _with_steps(behind)
        else:
            head, steps = _with_steps(text)
            inside = head.index(".py:") if in_file(head) else 0
            name, slash, allocation = head[inside:].partition("/")
            method = head[:inside] + name
        way = cls(method=method.strip(), allocation=allocation.strip() if slash else None, repair=steps)
        # Found here rather than among thirty rows.
        values: dict[str, Any] = {"model": "any", "method": way.method, "repair": {"steps": list(way.repair)}}
        if way.allocation is not None:
            values["allocation"] = way.allocation
        size = {"keep": 0.8} if way.low_rank else {"bits": 3.0}
        recipe_from({**values, "budget": size}, origin=f"--methods {shown(text)}")
        return way

    @property
    def label(self) -> str:
        """The method's name, of a class in a file the class."""
        return self.method.rpartition(":")[2]

    @property
    def low_rank(self) -> bool:
        """Whether it gives numbers, whose size is a fraction kept."""
        kind = method_class(self.method)
        return kind is None or kind.default_keep is not None

    def repairable(self, spelling: Spelling) -> bool:
        """Whether it gives factors that repairs know, with its size spelled so."""
        kind = method_class(self.method)
        return kind is None or kind(name=self.method, **kind.defaults({spelling: 1})).repairable

    def __str__(self) -> str:
        return (
            self.method
            + (f"/{self.allocation}" if self.allocation else "")
            + "".join(f"+{step}" for step in self.repair)
        )


def _with_steps(text: str) -> tuple[str, tuple[str, ...]]:
    """What stands before `+STEP+STEP...`, and the steps; the path of a file may have these signs of its own."""
    inside = text.rindex(".py:") if in_file(text) else 0
    head, *steps = text[inside:].split("+")
    return text[:inside] + head, tuple(steps)


def read_ways(text: str, spelling: Spelling, repair: Sequence[str] = ()) -> tuple[Way, ...]:
    """Read ways joined by commas, or `all` for every method that the spelling of the size fits.

    Args:
        text: such as `svd,bolaco/bayesian:5x1,two_sided+blocks`.
        spelling: how the size is spelled.
        repair: steps that every way of low rank is tried with as well.

    Raises:
        RecipeError: when a part is not known, or nothing is named.
    """
    if text == "all":
        parts = list(QUANTISING if spelling == "bits" else IN_NUMBERS)
    else:
        parts = []
        for part in text.split(","):
            # `manual:q=0.7,v=dense` has commas of its own.
            belongs = (
                parts and "=" in part and not in_file(part) and part.split("/")[0].split("+")[0].strip() not in METHODS
            )
            if belongs:
                parts[-1] += f",{part.strip()}"
            elif part.strip():
                parts.append(part.strip())
    ways = [Way.parse(part) for part in parts]
    if repair:
        ways += [
            way.model_copy(update={"repair": tuple(sorted(repair, key=STEPS.index))})
            for way in ways
            if way.repairable(spelling) and not way.repair
        ]
    if not ways:
        raise RecipeError("No method is named.", where="--methods", remedy="give --methods all, or a list")
    return tuple(dict.fromkeys(ways))


class Comparison(BaseModel):
    """What is compared, and the protocol that all share.

    Attributes:
        model: directory or hub name of the original.
        output: directory to write.
        spelling: whether sizes are fractions kept, bits a linear weight, or bytes of all weight files.
        sizes: each gives a column.
        ways: each gives a row.
        seeds: each way is tried with every one of them.
        texts: perplexity is measured on each.
        tasks: accuracy is measured on each.
        limit: examples of a task at most.
        task_text: what the local tasks are made from.
        prompts: continued greedily by each model.
        new_tokens: of each continuation.
        settings: keys of a recipe that all share, such as `calibration`; under `methods`, by name, settings of methods.
    """

    model_config = _FROZEN

    model: ModelName
    output: FilePath
    spelling: Spelling
    sizes: Annotated[tuple[float, ...], Field(min_length=1)]
    ways: Annotated[tuple[Way, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    texts: tuple[Evaluation, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    task_text: SourceText | None = None
    prompts: tuple[str, ...] = ()
    new_tokens: Count = 48
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _measures_something(self) -> Comparison:
        if not self.texts and not self.tasks:
            raise ValueError("nothing is measured: give texts or tasks")
        for key in ("executor", "workers"):
            if key in self.settings:
                raise ValueError(f"{key} is of the whole comparison: give --{key}")
        for key in _OF_A_WAY:
            if key in self.settings:
                raise ValueError(f"{key!r} is of each way and no key that all share; a method's own: methods.NAME.KEY")
        for node in ("budget", "repair", "methods"):
            if not isinstance(self.settings.get(node, {}), Mapping):
                raise ValueError(f"{node} holds a value, not keys")
        for key in ("budget." + spelling for spelling in _SPELLINGS if spelling in self.settings.get("budget", {})):
            raise ValueError(f"{key} is what the columns say")
        if "steps" in self.settings.get("repair", {}):
            raise ValueError("repair.steps is what the rows say: METHOD+STEP")
        known = {name for way in self.ways for name in (way.method, way.label)}
        for name, given in self.settings.get("methods", {}).items():
            if name not in known:
                raise ValueError(f"methods.{name} is of no row; {nearest(str(name)[:80], known)}")
            if not isinstance(given, Mapping):
                raise ValueError(f"methods.{name} holds a value, not keys")
        return self

    def recipe(self, way: Way, size: float, seed: int) -> Recipe:
        """The whole recipe of one cell.

        Raises:
            RecipeError: when it is not valid.
        """
        values: dict[str, Any] = {**self.settings, "model": self.model, "seed": seed}
        methods = values.pop("methods", {})
        given = methods.get(way.method) or methods.get(way.label) or {}
        values["method"] = {**given, "name": way.method} if given else way.method
        if way.allocation is not None:
            values["allocation"] = way.allocation
        budget = {key: value for key, value in dict(values.get("budget") or {}).items() if key not in _SPELLINGS}
        values["budget"] = {**budget, self.spelling: int(size) if self.spelling == "size" else size}
        values["repair"] = {**dict(values.get("repair") or {}), "steps": list(way.repair)}
        return recipe_from(values, origin=f"row {way}")


_SPELLINGS = ("keep", "bits", "size")
_OF_A_WAY = ("model", "output", "seed", "method", "allocation", "evaluation")


def comparison_from(values: Mapping[str, Any]) -> Comparison:
    """Validate.

    Raises:
        RecipeError: naming the key that is wrong.
    """
    try:
        return Comparison.model_validate(dict(values))
    except ValidationError as problem:
        raise explained(problem, "compare", lambda _: list(Comparison.model_fields)) from None


def read_sizes(text: str, spelling: Spelling) -> tuple[float, ...]:
    """Read `0.9,0.8` or, as sizes, `90MB,80MB`.

    Raises:
        RecipeError: when a part is no size.
    """
    found = []
    for part in (each.strip() for each in text.split(",")):
        try:
            found.append(float(parse_size(part)) if spelling == "size" else float(part))
        except ValueError:
            raise RecipeError(
                f"{shown(part)} is no size.",
                where=f"--{spelling}",
                remedy={"keep": "write 0.9,0.8", "bits": "write 2,2.5,3", "size": "write 90MB,70MB"}[spelling],
            ) from None
    return tuple(found)
