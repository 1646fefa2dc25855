"""What options of the command line mean, apart from the commands that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import RecipeError
from rankwise.plugins import in_file
from rankwise.reading import UnreadableError, file_exists, parse_yaml, shown

if TYPE_CHECKING:
    from rankwise.recipes import Recipe


def use_plan(
    values: dict[str, Any], plan: str | None, trials: int | None, *, method_given: bool, trusted: bool = False
) -> None:
    """Put a plan and a number of trials into a recipe's values, in place.

    A plan alone is taken over as it is. With trials, or with a search asked for, it is a start: 20 trials (as in the
    paper) in its own space unless said otherwise. Its size and its method hold unless others are given.

    Args:
        values: nested mapping.
        plan: its file, or None.
        trials: how many, or None.
        method_given: whether the method was.
        trusted: whether the plan's method may be code in a file.

    Raises:
        BudgetError: when the plan cannot be read.
        RecipeError: when trials are given and nothing is searched.
    """
    from rankwise.allocation import split_allocation
    from rankwise.recipes import set_value

    asked = values.get("allocation")
    name = split_allocation(asked)[0] if isinstance(asked, str) else as_settings(asked).get("name")
    if plan is not None:
        from rankwise.sizes import SPELLINGS, Plan

        given = Plan.load(Path(plan))
        budget = _keys_of(values, "budget")
        if not any(budget.get(spelling) is not None for spelling in SPELLINGS):
            spelling = dict(given.spelling)
            if all(value is None for value in spelling.values()) and (trials is not None or name == "bayesian"):
                spelling["bits"] = given.bits_a_weight
            for each, value in spelling.items():
                set_value(values, f"budget.{each}", value)
        if "rank_multiple" not in budget:
            set_value(values, "budget.rank_multiple", given.rank_multiple)
        if "storage" not in budget and any(not cut.coded and not cut.dense for cut in given.cuts.values()):
            set_value(values, "budget.storage", given.form.storage)
        if not method_given and values.get("method") is None:
            settled = {**given.method_settings, "name": given.method}
            for each in () if trusted else code_named(settled):
                raise RecipeError(
                    "The plan's method is code in a file, which a plan alone does not run.",
                    where=plan,
                    remedy=f"add --method {given.method} if you trust that file"
                    if each == given.method
                    else f"add --trust-remote-code if you trust {shown(each)}",
                )
            values["method"] = settled
        if name == "bayesian" or (trials is not None and name is None):
            settings = {"space": given.space or "rolesx1"} if name is None else as_settings(asked)
            values["allocation"] = {"trials": 20, **settings, "name": "bayesian", "plan": plan}
            name = "bayesian"
        elif name is None:
            values["allocation"] = {"name": "plan", "file": plan}
        else:
            raise RecipeError(
                f"A plan is given, and the allocation {name!r}, which takes none.",
                where="--plan",
                remedy="leave --allocation away, or use bayesian:GxL",
            )
    if trials is not None:
        if name != "bayesian":
            raise RecipeError(
                "Trials are given and nothing is searched.",
                where="--trials",
                remedy="add --allocation bayesian:spectral or another bayesian:GxL",
            )
        values["allocation"] = {**as_settings(values["allocation"]), "trials": trials}


def as_settings(allocation: Any) -> dict[str, Any]:
    """An allocation as a mapping, from the command line's form or from a recipe's; only what was set."""
    if isinstance(allocation, str):
        from rankwise.allocation import allocation_from, split_allocation

        return allocation_from(allocation).model_dump(exclude_unset=True) | {"name": split_allocation(allocation)[0]}
    if allocation is not None and not isinstance(allocation, Mapping):
        raise RecipeError(
            f"The allocation is {shown(allocation)}, neither a name nor keys.",
            where="allocation",
            remedy="see rankwise recipes show",
        )
    return dict(allocation or {})


def _keys_of(values: Mapping[str, Any], node: str) -> Mapping[str, Any]:
    """The keys of a node of a recipe, none where it is not given.

    Raises:
        RecipeError: when it holds a plain value.
    """
    found = values.get(node)
    if found is not None and not isinstance(found, Mapping):
        raise RecipeError(f"{node!r} holds a value, not keys.", where=node, remedy="see rankwise recipes show")
    return found or {}


def require_trust(values: Mapping[str, Any], trusted: bool, origin: str) -> None:
    """Raise when a recipe asks for code to be run and the command line does not: recipes are passed on, trust is not.

    Raises:
        RecipeError: naming the option.
    """
    if values.get("trust_remote_code") not in (None, False) and not trusted:
        raise RecipeError(
            "The recipe asks to run code that the model ships, which a recipe alone may not.",
            where=f"{origin}: trust_remote_code",
            remedy="add --trust-remote-code if you trust the model, or take the key out of the recipe",
        )


def code_named(node: Any) -> list[str]:
    """Classes in files that a node of a recipe names anywhere: its own name, a codebook, a method within a method."""
    if isinstance(node, Mapping):
        return [name for value in node.values() for name in code_named(value)]
    return [node] if in_file(node) else []


def require_trusted_code(values: Mapping[str, Any], trusted: bool, origin: str, given: Mapping[str, Any]) -> None:
    """Raise when a recipe names code in a file and the command line does not say that it may run.

    Args:
        values: the recipe's.
        trusted: whether the command line says so.
        origin: file name or such.
        given: by node, what the command line puts in its place; None for nothing.

    Raises:
        RecipeError: naming the option.
    """
    for node in ("method", "allocation") if not trusted else ():
        for name in code_named(values.get(node)) if given.get(node) is None else ():
            raise RecipeError(
                f"The recipe's {node} is code in a file, {shown(name)}, which a recipe alone may not run.",
                where=f"{origin}: {node}",
                remedy=f"add --trust-remote-code if you trust that file, or give it as --{node} yourself",
            )


FEW_BITS = ("q_bits", "rank", "lr_bits", "codebook")
"""Options that are settings of the method."""


def recipe_of(
    given: Mapping[str, Any],
    *,
    recipe: str | None,
    plan: str | None,
    trials: int | None,
    few: Mapping[str, Any],
    assignments: Sequence[str],
) -> Recipe:
    """The recipe that a file and the options over it give.

    Args:
        given: by dotted key, what options say; None for those that were not given. A question mark behind a key says
            that it holds where its node is given.
        recipe: a YAML file or the name of a ready recipe.
        plan: see `use_plan`.
        trials: see `use_plan`.
        few: of `FEW_BITS`, what was given.
        assignments: of the form `key=value`.

    Raises:
        RecipeError: when anything of it is not valid.
        BudgetError: when the plan cannot be read.
    """
    from rankwise.recipes import read_recipe, recipe_from, set_value

    values = read_recipe(recipe) if recipe else {}
    origin = recipe or "command line"
    require_trust(values, bool(given.get("trust_remote_code")), origin)
    require_trusted_code(values, bool(given.get("trust_remote_code")), origin, given)
    for key, value in given.items():
        if value is not None and not key.endswith("?"):
            set_value(values, key, value)
    for key, value in given.items():
        node = key.split(".")[0]
        if value is not None and key.endswith("?") and values.get(node) is not None:
            set_value(values, key.removesuffix("?"), value)
    trusted = bool(given.get("trust_remote_code"))
    use_plan(values, plan, trials, method_given=given.get("method") is not None, trusted=trusted)
    for key, value in few.items():
        if value is None:
            continue
        if values.get("method") is None:
            raise RecipeError(
                f"--{key.replace('_', '-')} is of quantize and caldera, and no method is given.",
                where="compress",
                remedy="add --method caldera, or --method quantize for Q alone",
            )
        set_value(values, f"method.{key}", value)
    for assignment in assignments:
        set_value(values, *split_assignment(assignment))
    require_trust(values, bool(given.get("trust_remote_code")), "--set")
    if values.get("model") is None:
        raise RecipeError("No model is given.", where="compress", remedy="rankwise compress MODEL --output DIR")
    if values.get("output") is None:
        raise RecipeError("No output is given.", where="compress", remedy="add --output DIR")
    return recipe_from(values, origin=origin)


def defaults_in_words(recipe: Recipe, sized: bool, named: bool = True) -> list[str]:
    """What a run takes where nothing was said, a line each, before it begins.

    Args:
        recipe: the whole run.
        sized: whether a size, a plan or a recipe was given.
        named: whether a method, a plan or a recipe was.
    """
    from rankwise.device import named_device

    given, said = recipe.calibration, []
    if not named and recipe.budget.bits is not None:
        said.append(f"method: {recipe.method.name}, as --bits is given and no --method")
    if not sized and recipe.budget.keep is not None:
        said.append(f"size: --keep {recipe.budget.keep:g}, as none is given")
    if "source" not in given.model_fields_set:
        said.append(
            "calibration: the documentation that Python carries, as no --calibration is given; text of the kind the "
            "model is for loses less"
        )
    if given.sequences == "auto":
        where = named_device(recipe.device).type
        count = given.counted(where)
        few = None if count is None else given.gradients_at(count, where)
        more = f", gradients at {few} of them" if few is not None and few != count else ""
        said.append(f"calibration: {count} sequences{more}, as usual on a {where.upper()}")
    return said


def scored_as(model: str, text: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What to score a model on: as options say, and as its report does where none says how.

    Args:
        model: directory or hub name.
        text: the source, if one was given.
        given: options on windows and sequences by their keys in a recipe; None for those that were not given.

    Returns:
        Keys of an evaluation, and whether they are the report's.

    Raises:
        RecipeError: when no text is given and no report names one.
        ModelError: when there is a report that cannot be read.
    """
    from rankwise.checkpoints import REPORT_FILE, fetched
    from rankwise.reports import Report

    asked = {key: value for key, value in given.items() if value is not None}
    file = Path(fetched(model)) / REPORT_FILE
    before: Any = None
    if not asked and file_exists(file):
        before = getattr(Report.load(file).recipe, "evaluation", None)
    if isinstance(before, Mapping) and text in (None, before.get("source")):
        known = ("source", *given)
        return {key: before[key] for key in known if before.get(key) is not None}, True
    if text is None:
        raise RecipeError(
            "No text is given to score on, and no report names one.",
            where=model,
            remedy="add --text text:FILE" if not asked else "add --text text:FILE to the options on it",
        )
    return {"source": text, **asked}, False


def put(values: dict[str, Any], given: Mapping[str, Any], assignments: Sequence[str] = ()) -> None:
    """Put options, and then assignments of the form `key=value`, into a recipe's values, in place.

    Args:
        values: nested mapping.
        given: by dotted key; None for options that were not given.
        assignments: of `--set`.

    Raises:
        RecipeError: when a key or an assignment is none.
    """
    from rankwise.recipes import set_value

    for key, value in given.items():
        if value is not None:
            set_value(values, key, value)
    for assignment in assignments:
        set_value(values, *split_assignment(assignment))


def separated(text: str | None) -> list[str]:
    """Parts joined by commas, without spaces around them and without empty ones."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def read_fractions(text: str) -> list[float]:
    """Read `0.2,0.5,0.8`.

    Raises:
        RecipeError: when a part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError("A fraction is no number.", where=f"--fractions {text}", remedy="write 0.2,0.5,0.8") from None


def split_assignment(assignment: str) -> tuple[str, Any]:
    """Split `budget.rank_multiple=1`, the value read as YAML.

    Raises:
        RecipeError: when it is not of that form.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            "An override is not of the form key=value.", where=assignment[:200], remedy="write --set budget.keep=0.7"
        )
    try:
        return path, parse_yaml(text)
    except UnreadableError as problem:
        raise RecipeError(
            "An override's value is not YAML of plain values.", where=assignment[:200], remedy=str(problem)
        ) from None
