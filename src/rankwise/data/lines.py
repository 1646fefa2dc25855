"""Files of JSON lines, read strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import DataError
from rankwise.reading import UnreadableError, file_exists, one_line, parse_json

_LONGEST_LINE = 1 << 28
_MARK = b"\xef\xbb\xbf"


def existing(target: str | Path) -> Path:
    """A file that is there.

    Raises:
        DataError: when there is none.
    """
    if not file_exists(target):
        raise DataError("There is no such file.", where=str(target), remedy="check the path given for the data")
    return Path(target)


def cannot_read(target: str | Path, problem: OSError) -> DataError:
    """The error for a file that the system does not let be read."""
    return DataError(
        f"The file cannot be read ({problem.strerror or one_line(problem)}).",
        where=str(target),
        remedy="check the file and its permissions",
    )


def known_keys(row: Any) -> str:
    """What a line has, in few words."""
    if not isinstance(row, Mapping):
        return type(row).__name__
    names = sorted(one_line(key, 40) for key in row)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line is and the object it holds, in order; empty lines are left out.

    Raises:
        DataError: when there is no such file; naming the first line that is no JSON object.
    """
    try:
        with existing(path).open("rb") as lines:
            number = 0
            while line := lines.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}, line {number}"
                # A mark of byte order belongs to the file, not to its first line.
                line = line.removeprefix(_MARK) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    row = parse_json(line, finite=False)
                except UnreadableError as problem:
                    raise DataError("A line is not JSON.", where=where, remedy=str(problem)) from None
                if not isinstance(row, dict):
                    raise DataError("A line is no JSON object.", where=where, remedy="write one object a line")
                yield where, row
    except OSError as problem:
        raise cannot_read(path, problem) from None
