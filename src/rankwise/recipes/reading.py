"""Recipes from files, from names and from options, and what is said where one is not valid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

from pydantic import BaseModel, ValidationError

from rankwise.allocation import ALLOCATIONS, allocation_from, split_allocation
from rankwise.errors import RecipeError, nearest
from rankwise.methods import METHODS
from rankwise.reading import UnreadableError, first_problem, one_line, parse_yaml, read_text, shown
from rankwise.recipes.compression import Recipe
from rankwise.recipes.paths import beside

_NAMED: dict[str, Mapping[str, Any]] = {"method": METHODS, "allocation": ALLOCATIONS}
"""Nodes that one of several classes describes, which the node's `name` says."""

_HELP = "see rankwise recipes show for a valid recipe"


def _known_keys(where: tuple[Any, ...]) -> list[str]:
    """Keys allowed at a place in a recipe, as far as classes describe it."""
    node: Any = Recipe
    for part in where:
        kinds = _NAMED.get(part) if node is Recipe else None
        field = getattr(node, "model_fields", {}).get(part)
        if kinds is not None:
            node = kinds
        elif isinstance(node, Mapping):
            node = node.get(part)
        elif field is not None:
            choices = (field.annotation, *getattr(field.annotation, "__args__", ()))
            node = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return [key for key in getattr(node, "model_fields", {}) if key != "name" or node is Recipe]


def explained(problem: ValidationError, origin: str, known: Any = _known_keys) -> RecipeError:
    """One error for people from pydantic's list: the first problem, its place, and the nearest known key.

    Args:
        problem: what pydantic raised.
        origin: file name or such.
        known: gives the keys allowed at a place.
    """
    # A misspelt key explains the required one that is then missing, so it comes first.
    error, _, message = first_problem(problem, before=("extra_forbidden",))
    # The tag of a node is no part of its path, and neither is its name.
    place = tuple(
        part for i, part in enumerate(error["loc"]) if not (i == 1 and part in _NAMED.get(str(error["loc"][0]), ()))
    )
    if len(place) > 1 and place[-1] == "name":
        place = place[:-1]
    path = one_line(".".join(str(part) for part in place) or "''", 200) if place else ""
    where = f"{origin}: {path}" if path else origin
    if error["type"] == "extra_forbidden":
        key, keys = str(place[-1]), known(error["loc"][:-1])
        remedy = nearest(key[:80], keys) if keys else _HELP
        return RecipeError(f"{shown(key)} is no key of a recipe.", where=where, remedy=remedy)
    if error["type"] == "missing":
        return RecipeError(f"{path!r} is missing.", where=origin, remedy=f"add {path}")
    if error["type"] in ("union_tag_invalid", "union_tag_not_found") and place[0] in _NAMED:
        given = error["input"].get("name", "") if isinstance(error["input"], Mapping) else error["input"]
        return RecipeError(
            f"There is no {place[0]} {shown(given)}.",
            where=where,
            remedy=nearest(str(given)[:80], _NAMED[place[0]]),
        )
    given = "" if isinstance(error["input"], Mapping | BaseModel) else f" (given: {shown(error['input'])})"
    return RecipeError(f"{path + ': ' if path else ''}{message}{given}.", where=where, remedy=_HELP)


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
        raise explained(problem, origin) from None


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at a dotted path, such as `budget.rank_multiple`, of a nested mapping, in place.

    Raises:
        RecipeError: when the path goes through a plain value, or a part of it is empty.
    """
    *parents, leaf = path.split(".")
    if not all((*parents, leaf)):
        raise RecipeError("A key is empty.", where=path, remedy="write budget.keep for the key keep in budget")
    node = values
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if depth == 0 and parent in _NAMED and not isinstance(child, Mapping):
            # A method may be given by its name alone, and by none at all when the default is meant.
            child = {"name": Recipe.model_fields[parent].default.name if child is None else child}
            if not isinstance(child["name"], str):
                child = child["name"]
            elif parent == "allocation" and split_allocation(child["name"])[1]:
                # As the command line writes it, with settings behind the colon.
                child = allocation_from(child["name"]).model_dump(exclude_unset=True) | {
                    "name": split_allocation(child["name"])[0]
                }
        child = {} if child is None else child
        if not isinstance(child, Mapping):
            raise RecipeError(f"{parent!r} holds a value, not keys.", where=path, remedy="see rankwise recipes show")
        node[parent] = child = dict(child)
        if depth == 0 and parent in _NAMED:
            child.setdefault("name", Recipe.model_fields[parent].default.name)
        node = child
    node[leaf] = value


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping in a YAML file, paths in it being relative to the file, or in a ready recipe given by its name.

    Raises:
        RecipeError: when it cannot be read, naming the nearest ready recipe.
    """
    in_file = name.endswith((".yaml", ".yml")) or os.path.exists(name)
    if in_file:
        try:
            text = read_text(name)
        except UnreadableError as problem:
            raise RecipeError("The recipe cannot be read.", where=name, remedy=str(problem)) from None
    else:
        ready = ready_recipes()
        if name not in ready:
            raise RecipeError(
                f"There is no ready recipe {shown(name)}.", where=name[:200], remedy=nearest(name[:80], ready)
            )
        text = ready[name]
    try:
        values = parse_yaml(text)
    except UnreadableError as problem:
        raise RecipeError("The recipe is not YAML of plain values.", where=name, remedy=str(problem)) from None
    if not isinstance(values, dict):
        raise RecipeError(
            "The recipe is not a mapping of keys to values.", where=name, remedy="see rankwise recipes show"
        )
    return beside(values, name) if in_file else values


def ready_recipes() -> dict[str, str]:
    """Ready recipes by name, as YAML text."""
    folder = resources.files("rankwise") / "recipes" / "ready"
    return {
        f.name.removesuffix(".yaml"): f.read_text()
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }
