"""`Lines`: JSON objects that are only ever added to a file, each tied to those before it by a hash.

A line that was changed, or that is missing among others, is noticed when the file is read, and with it all that follow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TIE = "chain"
"""Key of the hash in each line; no record has such a key of its own."""


def _tie(before: str, record: Mapping[str, Any]) -> str:
    """Hash of a record and of the hash of the line before it."""
    return hashlib.sha256(f"{before}{json.dumps(record, sort_keys=True)}".encode()).hexdigest()[:32]


class Lines:
    """A file of JSON objects, one a line. What is not as it was written is cut off when the file is opened.

    Args:
        path: the file; need not be there.

    Attributes:
        records: what the file holds.
        fault: what was wrong with the rest of it, or None; the file ends where it was whole then.
        torn: whether that is the one line that a kill leaves unfinished.
        rest: the bytes that were cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.fault: str | None = None
        self.torn = False
        self._last = ""
        content = path.read_bytes() if path.exists() else b""
        good = self._read(content)
        self.rest = content[good:]
        if self.rest:
            with path.open("r+b") as file:
                file.truncate(good)

    def _read(self, content: bytes) -> int:
        """Take over the lines that are whole; returns how many bytes those are."""
        good = 0
        *whole, unfinished = content.split(b"\n")
        for number, line in enumerate(whole, 1):
            record = self._record(line)
            if record is None:
                self.fault = f"line {number} is not as it was written"
                return good
            self.records.append(record)
            good += len(line) + 1
        if unfinished:
            self.fault, self.torn = "its last line is not whole", True
        return good

    def _record(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(line)
            tie = record.pop(_TIE)
            expected = _tie(self._last, record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if tie != expected:
            return None
        self._last = tie
        return dict(record)

    def add(self, record: Mapping[str, Any], *, sync: bool) -> None:
        """Add a line.

        Args:
            record: what it says; its numbers are finite.
            sync: whether it is on the disk itself when this returns, and not with the system alone.
        """
        tie = _tie(self._last, record)
        with self.path.open("a") as file:
            file.write(json.dumps({**record, _TIE: tie}, allow_nan=False) + "\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._last = tie
        self.records.append(dict(record))
