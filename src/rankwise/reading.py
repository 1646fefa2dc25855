"""Files and text from strangers, read strictly: each problem is an `UnreadableError`, which the readers put into words.

JSON and YAML are taken as plain data of bounded depth: objects, lists, text, finite numbers, true, false, null.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

DEEPEST = 64
"""Levels of lists and mappings in a file."""

LARGEST_YAML = 1 << 20
"""Characters of YAML that are read."""

_MOST_NODES = 20_000
"""Values in a YAML text, each reference to another one counted as all that it stands for."""

_LONGEST_NUMBER = 100
"""Digits of a whole number; what is computed of a few of them is still a float."""

_LONGEST_NAME = 255
_LONGEST_PATH = 4095
_LARGEST_WHOLE = 1 << 63


class UnreadableError(ValueError):
    """What is read is not of its form; the text says how, in one line."""


def is_text(value: str) -> bool:
    """Whether text can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(problem: object, most: int = 200) -> str:
    """The first line of a message, or the name of its type where it says nothing."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = lines[0] if lines else type(problem).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: Any, most: int = 60) -> str:
    """A value as Python writes it, in few characters, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = most
    try:
        return one_line(short.repr(value), 2 * most)
    except Exception:  # a foreign repr may do anything
        return f"a {type(value).__name__}"


def file_exists(path: str | Path) -> bool:
    """Whether there is a file of this name; a name that no file can have is no error."""
    return os.path.isfile(path)


def check_path(text: str, beside: int = 0) -> str:
    """A path that a file system can hold.

    Args:
        text: the path.
        beside: characters by which a name beside it is longer.

    Raises:
        ValueError: when it cannot, saying why.
    """
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("a path holds no null character")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ValueError("the path is no valid text (UTF-8)") from None
    if any(len(part) > _LONGEST_NAME - beside for part in data.split(b"/")):
        raise ValueError("a name in the path is longer than a file system takes")
    if len(data) > _LONGEST_PATH:
        raise ValueError("the path is longer than a file system takes")
    return text


def read_bytes(path: str | Path) -> bytes:
    """What a file holds.

    Raises:
        UnreadableError: when it is no file, or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise UnreadableError(problem.strerror or one_line(problem)) from None
    except ValueError as problem:
        raise UnreadableError(one_line(problem)) from None


def decoded(content: bytes) -> str:
    """Text of UTF-8 bytes; a mark of byte order at the start is no part of it.

    Raises:
        UnreadableError: naming the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UnreadableError(f"it is not UTF-8 text (byte {problem.start})") from None


def read_text(path: str | Path) -> str:
    """The text in a UTF-8 file.

    Raises:
        UnreadableError: when it cannot be read, or is not UTF-8.
    """
    return decoded(read_bytes(path))


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"{name} is no number that JSON knows")


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise UnreadableError(f"a number has more than {_LONGEST_NUMBER} digits")
    return int(digits)


def parse_json(content: bytes | str, finite: bool = True) -> Any:
    """A value from JSON text.

    Args:
        content: the text, or its bytes in UTF-8.
        finite: refuse NaN and infinities, which Python writes though JSON has none.

    Raises:
        UnreadableError: when it is not JSON, too deep, or holds a number that is not finite or what is no Unicode.
    """
    text = decoded(content) if isinstance(content, bytes) else content
    try:
        value = json.loads(text, parse_constant=_refuse_constant if finite else float, parse_int=_whole)
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(f"it is nested deeper than {DEEPEST} levels") from None
    except ValueError as problem:
        raise UnreadableError(one_line(problem)) from None
    check_plain(value, finite)
    return value


def read_json(path: str | Path) -> Any:
    """A value from a JSON file; errors as for `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path))


def check_plain(value: Any, finite: bool = True) -> None:
    """Raise unless a value is plain data of bounded depth: text is Unicode, numbers are finite.

    Args:
        value: of lists, mappings, text, numbers, truth values and None.
        finite: whether numbers have to be.

    Raises:
        UnreadableError: saying what it holds.
    """
    level = [value]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                deeper.extend(each.keys())
                deeper.extend(each.values())
            elif isinstance(each, list | tuple):
                deeper.extend(each)
            elif isinstance(each, str):
                if not is_text(each):
                    raise UnreadableError("it holds half a surrogate pair, which is no text")
            elif finite and isinstance(each, float) and not math.isfinite(each):
                raise UnreadableError(f"it holds {each}, which is no finite number")
        if not deeper:
            return
        # What is referred to often is looked at once.
        level = list({id(each): each for each in deeper}.values())
    raise UnreadableError(f"it is nested deeper than {DEEPEST} levels")


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags and dates, whose references may not multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise UnreadableError(f"the tag {shown(event.tag)} in line {event.start_mark.line + 1}; values are plain")
        if self._depth >= DEEPEST:
            raise UnreadableError(f"it is nested deeper than {DEEPEST} levels")
        is_reference = isinstance(event, yaml.AliasEvent)
        before = self._nodes
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_reference:
            if id(node) not in self._sizes:
                raise UnreadableError(f"what line {event.start_mark.line + 1} refers to holds itself")
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise UnreadableError(
                f"it holds more than {_MOST_NODES:,} values, references counted as what they stand for"
            )
        return node


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """A value from YAML text. Dates stay text, keys are text, and tags are refused.

    Raises:
        UnreadableError: when it is not such YAML, too deep or too large, or holds a number that is not finite.
    """
    if len(text) > LARGEST_YAML:
        raise UnreadableError(f"it is longer than {LARGEST_YAML:,} characters")
    loader = None
    try:
        loader = _PlainLoader(text)
        value = loader.get_single_data()
    except UnreadableError:
        raise
    except yaml.YAMLError as problem:
        raise UnreadableError(" ".join(str(problem).split())[:300]) from None
    except RecursionError:
        raise UnreadableError(f"it is nested deeper than {DEEPEST} levels") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as problem:
        # The constructors of yaml's own values fail so: `0b_` looks like a number.
        raise UnreadableError(f"a value cannot be read ({one_line(problem)})") from None
    finally:
        if loader is not None:
            loader.dispose()
    check_plain(value)
    _check_keys(value)
    return value


def _check_keys(value: Any) -> None:
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, int) and abs(each) >= _LARGEST_WHOLE:
            raise UnreadableError("it holds a whole number of more than 63 bits")
        if not isinstance(each, dict | list) or id(each) in seen:
            continue
        seen.add(id(each))
        for key in each if isinstance(each, dict) else ():
            if not isinstance(key, str):
                raise UnreadableError(f"the key {shown(key)} is no text; put it in quotes")
        waiting.extend(each.values() if isinstance(each, dict) else each)


_BRANCH = re.compile(r"constrained-\w+|literal\[.*\]")
"""What pydantic calls the kinds that a value may be of, and puts behind its place."""


def first_problem(problem: ValidationError, before: tuple[str, ...] = ()) -> tuple[dict[str, Any], str, str]:
    """Of pydantic's list of problems the one to tell, its place with dots, and its message.

    Args:
        problem: what pydantic raised.
        before: types of problems that explain others, so that they come first.
    """
    errors = problem.errors(include_url=False)
    error: dict[str, Any] = dict(min(errors, key=lambda each: each["type"] not in before))
    *at, last = error["loc"] or ("",)
    if _BRANCH.fullmatch(str(last)):
        # A value that may be of several kinds: each has a problem of its own, and none is a key.
        others = [each["msg"] for each in errors if each["loc"][:-1] == tuple(at) and each["loc"] != error["loc"]]
        error["msg"] += "".join(f", or {other.removeprefix('Input should be ')}" for other in others)
        error["loc"] = tuple(at)
    place = ".".join(one_line(part, 80) if part != "" else "''" for part in error["loc"])
    return error, place, one_line(error["msg"].removeprefix("Value error, "), 400)
