"""Classes of one's own: in a file (`FILE.py:Class`), or as an entry point of an installed package.

Methods, allocations and codebooks come in this way; what they have in common is how they are found, and a hash of their
code, so that finished stages of another version of a file are not taken for its own.
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

from pydantic import AfterValidator, BaseModel, ValidationError, create_model

from rankwise.errors import RecipeError, nearest
from rankwise.reading import first_problem, one_line, shown


def in_file(name: object) -> bool:
    """Whether a name is a class in a file, `FILE.py:Class`."""
    return isinstance(name, str) and ".py:" in name


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


class Plugins:
    """Classes of one kind that are not part of this package.

    Args:
        noun: what they are, for messages; an entry point stands in the group `rankwise.NOUNs`.
        base: what they derive from.
        advice: which class to derive from, for messages.
    """

    def __init__(self, noun: str, base: type, advice: str) -> None:
        self.noun, self.base, self.advice = noun, base, advice
        self.group = f"rankwise.{noun}s"

    def has(self, name: object) -> bool:
        """Whether a name stands for one of them; a file is not opened."""
        return in_file(name) or (isinstance(name, str) and name in installed(self.group))

    def branch(self, value: Any, known: Mapping[str, Any]) -> str:
        """Which branch of a union, told by names, a value in a recipe belongs to: `plugin`, or a known name.

        Args:
            value: a name, a mapping with one, or a settings object.
            known: those of this package, which come first.
        """
        named = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", value)
        return "plugin" if self.has(named) and named not in known else str(named)

    def found(self, name: str) -> tuple[type, str]:
        """The class behind a name, and what says its version: a hash of its file, or a package's version.

        Args:
            name: `FILE.py:Class`, or that of an entry point.

        Raises:
            RecipeError: when there is none, it cannot be imported, or it is no whole class of this kind.
        """
        if in_file(name):
            file, _, wanted = name.rpartition(":")
            try:
                source = Path(file).read_bytes()
            except OSError as problem:
                raise RecipeError(
                    f"The file of the {self.noun} cannot be read ({problem.strerror}).",
                    where=name,
                    remedy="check the path",
                ) from None
            code = hashlib.sha256(source).hexdigest()[:16]
            return self._whole(name, self._in_module(name, self._module(file, code, source), wanted)), code
        point = installed(self.group)[name]
        try:
            found = point.load()
        except Exception as problem:
            raise RecipeError(
                f"The {self.noun} cannot be imported ({type(problem).__name__}: {one_line(problem)[:200]}).",
                where=f"{name} = {point.value}",
                remedy="reinstall the package that brings it",
            ) from None
        return self._whole(name, found), "" if point.dist is None else point.dist.version

    def node(self, name: str) -> type[Any]:
        """The class behind a name as a node of a recipe, with the name and its version among its settings.

        Raises:
            RecipeError: as `found` does.
        """
        found, code = self.found(name)
        return _as_node(self.noun, name, found, code)

    def read(self, value: Any) -> Any:
        """A settings object from the mapping in a recipe; anything else is left as it is.

        Raises:
            RecipeError: when there is no such class, or a setting of it is wrong.
        """
        if not isinstance(value, Mapping):
            return value
        kind = self.node(str(value.get("name")))
        try:
            return kind.model_validate(dict(value))
        except ValidationError as problem:
            error, place, message = first_problem(problem, before=("extra_forbidden",))
            known = [key for key in kind.model_fields if key not in ("name", "code")]
            if error["type"] == "extra_forbidden":
                raise RecipeError(
                    f"{shown(error['loc'][-1])} is no setting of the {self.noun}.",
                    where=f"{self.noun}: {place}",
                    remedy=nearest(str(error["loc"][-1]), known) if known else "it has none",
                ) from None
            raise RecipeError(
                f"{message}.", where=f"{self.noun}: {place}", remedy=f"see the class of the {self.noun}"
            ) from None

    def _module(self, file: str, code: str, source: bytes) -> Any:
        try:
            return _run(file, code, source)
        except Exception as problem:
            lines = [each.lineno for each in traceback.extract_tb(problem.__traceback__) if each.filename == file]
            line = getattr(problem, "lineno", None) or (lines[-1] if lines else None)
            raise RecipeError(
                f"The file of the {self.noun} cannot be run ({type(problem).__name__}: {one_line(problem)[:200]}).",
                where=file if line is None else f"{file}, line {line}",
                remedy="mend it; python FILE.py says more",
            ) from None

    def _in_module(self, name: str, module: Any, wanted: str) -> Any:
        found = getattr(module, wanted, None)
        if found is None:
            own = [
                key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, self.base)
            ]
            raise RecipeError(
                f"The file has no class {shown(wanted)}.",
                where=name,
                remedy=nearest(wanted, own) if own else f"it holds no {self.noun}; {self.advice}",
            )
        return found

    def _whole(self, name: str, found: Any) -> type:
        if not (inspect.isclass(found) and issubclass(found, self.base)):
            raise RecipeError(f"What is named is no {self.noun}.", where=name, remedy=self.advice)
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise RecipeError(
                f"The {self.noun} lacks {', '.join(missing)}.",
                where=name,
                remedy=f"define {missing[0]}; see docs/add-a-method.md",
            )
        return found


@cache
def _run(file: str, code: str, source: bytes) -> ModuleType:
    """The module in a file, run once for each version of it: the very bytes that were hashed."""
    title = f"rankwise_own_{code}"
    module = ModuleType(title)
    module.__file__ = file
    sys.modules[title] = module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[title]
        raise
    return module


@cache
def _as_node(noun: str, name: str, found: Any, code: str) -> type[BaseModel]:
    """The class with its name and its version as settings."""

    def same(given: str) -> str:
        if given != code:
            raise ValueError(f"the code of the {noun} has changed since this was written; take the key `code` out")
        return given

    fields: dict[str, Any] = {
        "name": (Literal[name], name),
        "code": (Annotated[str, AfterValidator(same)], code),
    }
    return create_model(found.__name__, __base__=found, __module__=found.__module__, **fields)
