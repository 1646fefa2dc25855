"""The log of trials: append-only JSON lines, so that a search that was killed goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import RunError, is_disk_full
from rankwise.progress import Reporter
from rankwise.runs import Lines

_FORMAT = "rankwise-trials/1"


class TrialLog:
    """Finished trials, in memory and (with a path) on disk, one JSON object a line after a header line.

    A last line that is not whole, as a kill may leave it, is dropped with a note. So are a line that is not as it was
    written and all that follow: these trials run again, and the lines are kept in a file beside the log.

    Args:
        path: the file, or None to keep trials in memory only.
        key: hash of all that an outcome depends on.
        reporter: told about dropped lines.

    Raises:
        RunError: when the file belongs to other settings, or cannot be read.
    """

    def __init__(self, path: Path | None, key: str, reporter: Reporter) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = Lines(path)
            if self._lines.fault is not None:
                self._tell(path, reporter)
            header, *records = self._lines.records or [{"format": _FORMAT, "key": key}]
            if not self._lines.records:
                self._lines.add(header, sync=True)
        except OSError as problem:
            if is_disk_full(problem):
                raise
            raise RunError(
                f"The log of trials cannot be read or written ({problem.strerror}).",
                where=str(path),
                remedy="move it away, or give another --run-dir",
            ) from None
        if header.get("format") != _FORMAT or header.get("key") != key:
            raise RunError(
                "The trial log belongs to another recipe.",
                where=str(path),
                remedy="move it away, or give another --run-dir",
            )
        self.records = records

    def _tell(self, path: Path, reporter: Reporter) -> None:
        """Say what was dropped, and keep it where it may have been more than a line."""
        if self._lines.torn:
            reporter.note(f"the last line of {path} was not whole (a kill?) and is dropped", passing=True)
            return
        aside = path.with_name(f"{path.name}.damaged")
        aside.write_bytes(self._lines.rest)
        whole = max(0, len(self._lines.records) - 1)
        reporter.note(
            f"{path} was damaged ({self._lines.fault}): {whole} are kept, and those after them run again; what was "
            f"there is in {aside.name}",
            passing=True,
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished trial; it is on disk when this returns."""
        self.records.append(dict(record))
        if self.path is not None:
            self._lines.add(record, sync=True)


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None when it is not finite."""
    return value if math.isfinite(value) else None
