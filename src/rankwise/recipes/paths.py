"""Paths in a recipe's file are relative to that file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from rankwise.allocation import split_allocation
from rankwise.data import FILE_KINDS, Source, parse_source
from rankwise.errors import DataError
from rankwise.plugins import in_file

Resolve = Callable[[str], str]

_PLAN_KEYS = {"plan": "file", "bayesian": "plan"}
"""By allocation, the setting that names a plan."""


def beside(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A recipe's values with absolute paths, the same wherever the command runs.

    Args:
        values: nested mapping; what is no text where a path is expected is left for validation.
        file: the recipe's.
    """
    folder = os.path.dirname(os.path.abspath(file))

    def resolve(path: str) -> str:
        # A path that is absolute stays as it is.
        try:
            return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
        except ValueError:  # no path: validation says so
            return path

    found = dict(values)
    nodes: dict[tuple[str, ...], Resolve] = {
        ("model",): lambda path: _model(path, resolve),
        ("output",): resolve,
        ("calibration", "source"): lambda text: _source(text, resolve),
        ("validation", "source"): lambda text: _source(text, resolve),
        ("evaluation", "source"): lambda text: _source(text, resolve),
        ("repair", "data"): lambda text: _source(text, resolve),
        ("allocation",): lambda text: _allocation(text, resolve),
        ("allocation", "name"): lambda name: _class(name, resolve),
        ("method",): lambda name: _class(name, resolve),
        ("method", "name"): lambda name: _class(name, resolve),
        ("method", "codebook"): lambda name: _class(name, resolve),
        ("method", "lr_codebook"): lambda name: _class(name, resolve),
    }
    given = values.get("allocation")
    if isinstance(given, Mapping) and (key := _PLAN_KEYS.get(str(given.get("name")))):
        nodes["allocation", key] = resolve
    for place, change in nodes.items():
        _put(found, place, change)
    return found


def _put(values: dict[str, Any], place: tuple[str, ...], change: Resolve) -> None:
    key, *below = place
    value = values.get(key)
    if below and isinstance(value, Mapping):
        values[key] = dict(value)
        _put(values[key], tuple(below), change)
    elif not below and isinstance(value, str) and value:
        values[key] = change(value)


def _model(name: str, resolve: Resolve) -> str:
    """A directory beside the recipe, or a name on the hub."""
    path = resolve(name)
    return path if name.startswith((".", "~", "/")) or os.path.exists(path) else name


def _source(text: str, resolve: Resolve) -> str:
    try:
        source = parse_source(text)
    except DataError:
        return text
    if source.kind not in FILE_KINDS:
        return text
    return str(Source(source.kind, resolve(source.target), source.field))


def _class(name: str, resolve: Resolve) -> str:
    return resolve(name) if in_file(name) else name


def _allocation(text: str, resolve: Resolve) -> str:
    name, rest = split_allocation(text)
    if name == "plan" and rest:
        return f"plan:{resolve(rest)}"
    return _class(name, resolve) + (f":{rest}" if rest else "") if in_file(name) else text
