"""What options of the command line mean, apart from the commands that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.errors import RecipeError


def use_plan(values: dict[str, Any], plan: str | None, trials: int | None, *, method_given: bool) -> None:
    """Put a plan and a number of trials into a recipe's values, in place.

    A plan alone is taken over as it is. With trials, or with a search asked for, it is a start: 20 trials (as in the
    paper) in its own space unless said otherwise. Its size and its method hold unless others are given.

    Args:
        values: nested mapping.
        plan: its file, or None.
        trials: how many, or None.
        method_given: whether the method was.

    Raises:
        BudgetError: when the plan cannot be read.
        RecipeError: when trials are given and nothing is searched.
    """
    from rankwise.recipes import set_value

    asked = values.get("allocation")
    name = asked.split(":")[0] if isinstance(asked, str) else asked["name"] if isinstance(asked, dict) else None
    if plan is not None:
        from rankwise.sizes import SPELLINGS, Plan

        given = Plan.load(Path(plan))
        budget = values.get("budget") or {}
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
        if not method_given and "method" not in values:
            values["method"] = {"name": given.method, **given.method_settings}
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
        from rankwise.allocation import allocation_from

        return allocation_from(allocation).model_dump(exclude_unset=True) | {"name": allocation.split(":")[0]}
    return dict(allocation)


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
    import yaml

    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            "An override is not of the form key=value.", where=assignment, remedy="write --set budget.keep=0.7"
        )
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise RecipeError(
            "An override's value is not YAML.", where=assignment, remedy=str(problem).splitlines()[0]
        ) from None
