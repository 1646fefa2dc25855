"""The log of trials: append-only JSON lines, so that a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import RunError
from rankwise.progress import Reporter

_FORMAT = "rankwise-trials/1"


class TrialLog:
    """Finished trials, in memory and (with a path) on disk, one JSON object a line after a header line.

    A last line that is not whole, as a kill may leave it, is dropped with a note.

    Args:
        path: the file, or None to keep trials in memory only.
        key: hash of all that an outcome depends on.
        reporter: told about a dropped line.

    Raises:
        RunError: when the file belongs to other settings, or is damaged before its last line.
    """

    def __init__(self, path: Path | None, key: str, reporter: Reporter) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": _FORMAT, "key": key}
        if not path.exists() or not path.read_bytes():
            self._write_line(header)
            return
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)
        good = 0
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(record, dict):
                    raise ValueError("cut short")
            except ValueError:
                if number < len(lines) - 1:
                    raise RunError(
                        f"Line {number + 1} of the trial log is damaged, and more follow it.",
                        where=str(path),
                        remedy="delete the file to search again, or cut it before that line",
                    ) from None
                reporter.note(f"the last line of {path} was not whole (a kill?) and is dropped")
                break
            if number == 0:
                if record.get("format") != _FORMAT or record.get("key") != key:
                    raise RunError(
                        "The trial log belongs to another recipe.",
                        where=str(path),
                        remedy="move it away, or give another --run-dir",
                    )
            else:
                self.records.append(record)
            good += len(line)
        if good < len(content):
            with path.open("r+b") as file:
                file.truncate(good)
        if good == 0:
            self._write_line(header)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished trial; it is on disk when this returns."""
        self.records.append(dict(record))
        if self.path is not None:
            self._write_line(record)

    def _write_line(self, record: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None when it is not finite."""
    return value if math.isfinite(value) else None
