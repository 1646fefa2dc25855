"""Methods of one's own: a class in a file (`FILE.py:Class`), or an entry point of an installed package.

Such a method is a node in recipes and plans like any other. Beside its name its settings have the hash of its code, so
that finished stages of another version of the file are not taken for its own.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny, ValidationError, create_model

from rankwise.errors import RecipeError, nearest
from rankwise.methods.base import Method
from rankwise.reading import first_problem, one_line, shown

GROUP = "rankwise.methods"
"""Of entry points: name of the method -> its class."""


def in_file(name: object) -> bool:
    """Whether a method's name is a class in a file, `FILE.py:Class`."""
    return isinstance(name, str) and ".py:" in name


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def is_plugin(name: object) -> bool:
    """Whether a name stands for a method that is not part of this package."""
    return in_file(name) or (isinstance(name, str) and name in _installed())


def plugin_class(name: str) -> type[Method]:
    """The class behind a name, with the name and the hash of its code among its settings.

    Args:
        name: `FILE.py:Class`, or that of an entry point.

    Raises:
        RecipeError: when there is none, it cannot be imported, or it is no whole method.
    """
    if in_file(name):
        file, _, wanted = name.rpartition(":")
        try:
            source = Path(file).read_bytes()
        except OSError as problem:
            raise RecipeError(
                f"The file of the method cannot be read ({problem.strerror}).", where=name, remedy="check the path"
            ) from None
        code = hashlib.sha256(source).hexdigest()[:16]
        return _in_module(name, _module(file, code, source), wanted, code)
    point = _installed()[name]
    try:
        found = point.load()
    except Exception as problem:
        raise RecipeError(
            f"The method cannot be imported ({type(problem).__name__}: {one_line(problem)[:200]}).",
            where=f"{name} = {point.value}",
            remedy="reinstall the package that brings it",
        ) from None
    version = "" if point.dist is None else point.dist.version
    return _as_node(name, found, version)


@cache
def _module(file: str, code: str, source: bytes) -> Any:
    """The module in a file, run once for each version of it: the very bytes that were hashed."""
    title = f"rankwise_method_{code}"
    module = ModuleType(title)
    module.__file__ = file
    sys.modules[title] = module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except Exception as problem:
        del sys.modules[title]
        lines = [each.lineno for each in traceback.extract_tb(problem.__traceback__) if each.filename == file]
        line = getattr(problem, "lineno", None) or (lines[-1] if lines else None)
        raise RecipeError(
            f"The file of the method cannot be run ({type(problem).__name__}: {one_line(problem)[:200]}).",
            where=file if line is None else f"{file}, line {line}",
            remedy="mend it; python FILE.py says more",
        ) from None
    return module


def _in_module(name: str, module: Any, wanted: str, code: str) -> type[Method]:
    found = getattr(module, wanted, None)
    if found is None:
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Method)]
        raise RecipeError(f"The file has no class {shown(wanted)}.", where=name, remedy=nearest(wanted, own))
    return _as_node(name, found, code)


@cache
def _as_node(name: str, found: Any, code: str) -> type[Method]:
    """The class with its name and the hash of its code as settings.

    Raises:
        RecipeError: when it is no method, or not a whole one.
    """
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise RecipeError(
            "What is named is no method.", where=name, remedy="derive it from rankwise.methods.Factorisation or Method"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise RecipeError(
            f"The method lacks {', '.join(missing)}.",
            where=name,
            remedy=f"define {missing[0]}; see docs/add-a-method.md",
        )

    def same(given: str) -> str:
        if given != code:
            raise ValueError("the code of the method has changed since this was written; take the key `code` out")
        return given

    fields: dict[str, Any] = {
        "name": (Literal[name], name),
        "code": (Annotated[str, AfterValidator(same)], code),
    }
    return create_model(found.__name__, __base__=found, __module__=found.__module__, **fields)


def _plugged(value: Any) -> Any:
    """A method from the mapping in a recipe.

    Raises:
        RecipeError: when there is no such method, or a setting of it is wrong.
    """
    if not isinstance(value, Mapping):
        return value
    kind = plugin_class(str(value.get("name")))
    try:
        return kind.model_validate(dict(value))
    except ValidationError as problem:
        error, place, message = first_problem(problem, before=("extra_forbidden",))
        known = [key for key in kind.model_fields if key not in ("name", "code")]
        if error["type"] == "extra_forbidden":
            raise RecipeError(
                f"{shown(error['loc'][-1])} is no setting of the method.",
                where=f"method: {place}",
                remedy=nearest(str(error["loc"][-1]), known) if known else "it has none",
            ) from None
        raise RecipeError(f"{message}.", where=f"method: {place}", remedy="see the class of the method") from None


Plugged = Annotated[SerializeAsAny[Method], BeforeValidator(_plugged)]
"""A method that is not part of this package, in a recipe."""
