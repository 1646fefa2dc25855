"""The readers of JSON and YAML: what is plain is taken as it is, everything else is refused in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rankwise.reading import (
    UnreadableError,
    check_path,
    check_plain,
    parse_json,
    parse_yaml,
    read_bytes,
    read_text,
    shown,
)

# What writes YAML here folds "next line" into a space, without a reader of ours.
_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85"), max_size=8)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(_PLAIN)
def test_plain_values_are_read_as_they_were_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NaN", "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ("1e999", "no finite number"),
        ("[" * 100 + "]" * 100, "deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "deeper than 64"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ("9" * 101, "digits"),
        ("{", "Expecting"),
        ("", "Expecting"),
        (b"\xff\xfe{}", "byte 0"),
        ('{"a": 1}\0', "Extra data"),
    ],
)
def test_json_that_is_not_plain_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(UnreadableError, match=says):
        parse_json(text)


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeff{}".encode())
    assert parse_json(read_bytes(tmp_path / "a")) == {}
    assert read_text(tmp_path / "a") == "{}"


def test_python_writes_nan_into_lines_of_data_and_there_it_is_taken() -> None:
    assert parse_json('{"text": "a", "score": NaN}', finite=False)["text"] == "a"


def _bomb(levels: int) -> str:
    names = [f"n{i}" for i in range(levels)]
    rest = "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in itertools.pairwise(names))
    return "n0: &n0 [x, x, x, x, x, x, x, x, x]\n" + rest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_bomb(9), "more than 20,000 values"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a\n  b: *a", "holds itself"),
        ("- " * 100, "deeper than 64"),
        ("[" * 5000, "deeper than 64"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!binary aaaa", "tag"),
        ("a: .nan", "no finite number"),
        ("a: -.inf", "no finite number"),
        ("1: a", "the key 1 is no text"),
        ("yes: a", "the key True is no text"),
        ("? [a]\n: b", "unhashable"),
        ("a: 0b_", "cannot be read"),
        ("a: 0x_", "cannot be read"),
        (f"a: {2**64}", "63 bits"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: [1", "expected"),
        ("a: \0", "special characters"),
        ('a: "\\ud800"', "surrogate"),
        ("a: b\n---\nc: d", "single document"),
        ("x" * (1 << 21), "longer than"),
    ],
)
def test_yaml_that_is_not_plain_is_refused(text: str, says: str) -> None:
    with pytest.raises(UnreadableError, match=says):
        parse_yaml(text)


def test_yaml_may_refer_to_what_it_said_and_dates_stay_text() -> None:
    assert parse_yaml("a: &n {length: 16}\nb: *n\nc: {<<: *n, seed: 1}") == {
        "a": {"length": 16},
        "b": {"length": 16},
        "c": {"length": 16, "seed": 1},
    }
    assert parse_yaml("a: 2026-01-01") == {"a": "2026-01-01"}


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "directory"),
        (tmp_path / ("a" * 300), "long"),
        ("\0", "null"),
        ("nowhere", "No such"),
    ):
        with pytest.raises(UnreadableError, match=says):
            read_bytes(path)


@pytest.mark.parametrize(
    ("path", "says"),
    [("", "empty"), ("a\0b", "null"), ("\udcff", "UTF-8"), ("a/" + "b" * 256, "longer"), ("é" * 128, "longer")],
)
def test_paths_that_no_file_system_takes_are_refused(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_path(path)


def test_a_path_needs_room_for_what_is_written_beside_it() -> None:
    assert check_path("a/" + "b" * 255) == "a/" + "b" * 255
    with pytest.raises(ValueError, match="longer"):
        check_path("b" * 250, beside=6)


def test_any_value_is_shown_in_few_characters() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert len(shown("x" * 10**6)) < 130
    assert len(shown([["x" * 100] * 100] * 100)) < 130
    assert "\ud800" not in shown("\ud800")
    assert isinstance(shown(Silent()), str)
    with pytest.raises(UnreadableError):
        check_plain([float("nan")])
