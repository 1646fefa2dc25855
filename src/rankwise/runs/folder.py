"""`Folder`: files that are taken over only as they were written.

A list beside the files, `manifest.jsonl`, says the size and the hash of each; its lines are tied to one another. A file
is in the list once it is whole. What is not in it, or is not as it says, is not there for anyone who asks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.progress import Reporter
from rankwise.runs.files import clear_unfinished, replacing, to_disk
from rankwise.runs.lines import Lines

MANIFEST = "manifest.jsonl"

_FORMAT = "rankwise-stage/1"

_SYNC_SECONDS = 10.0
"""How much work a power cut may cost; less than that is done again faster than a disk confirms every file."""


class Folder:
    """A folder of files with the list of them.

    Args:
        path: made if absent.
        label: what it holds; a folder of another label is not taken for it.
        reporter: told what is damaged.

    Attributes:
        finished: whether the list was closed.
        notes: what was to be known about the making of these files.
        fault: what was wrong with the list itself when it was opened, or None.
    """

    def __init__(self, path: Path, label: str, reporter: Reporter) -> None:
        self.path, self.label = path, label
        self.finished = False
        self.notes: list[str] = []
        self._reporter = reporter
        self._listed: dict[str, dict[str, Any]] = {}
        self._right: set[str] = set()
        self._waiting: list[Path] = []
        self._synced = time.monotonic()
        path.mkdir(parents=True, exist_ok=True)
        used = any(entry.name != MANIFEST for entry in path.iterdir())
        self._lines = Lines(path / MANIFEST)
        self.fault = self._open(used)

    def _open(self, used: bool) -> str | None:
        """Read the list, or begin it; returns what is wrong with it."""
        header = {"format": _FORMAT, "of": self.label}
        fault = None if self._lines.fault is None else f"{MANIFEST}: {self._lines.fault}"
        records = self._lines.records
        if records and records[0] != header:
            fault = f"{MANIFEST} is of {records[0].get('of')}"
            self._lines.path.unlink()
            self._lines = Lines(self._lines.path)
            records = []
        if used and not records and fault is None:
            fault = f"{MANIFEST} is missing or empty"
        if not records:
            self._lines.add(header, sync=False)
        for record in records[1:]:
            if "file" in record:
                self._listed[record["file"]] = record
            elif "gone" in record:
                self._listed.pop(record["gone"], None)
            elif "note" in record:
                self.notes.append(record["note"])
            self.finished = self.finished or "finished" in record
        return fault

    def names(self) -> list[str]:
        """Of all files in the list."""
        return list(self._listed)

    def wrong_with(self, name: str) -> str | None:
        """What keeps a listed file from being taken over; None for nothing. Its contents are read once a process."""
        if name in self._right:
            return None
        known, file = self._listed[name], self.path / name
        try:
            if not file.is_file():
                return "is missing"
            if file.stat().st_size != known["bytes"]:
                return f"has {file.stat().st_size} bytes, not {known['bytes']}"
            if _hash(file) != known["sha256"]:
                return "has other contents than were written"
        except OSError as problem:
            return f"cannot be read: {problem.strerror}"
        self._right.add(name)
        return None

    def has(self, name: str) -> bool:
        """Whether a file is there as it was written. One that is listed and is not is said, and listed no more."""
        if name not in self._listed:
            return False
        wrong = self.wrong_with(name)
        if wrong is not None:
            del self._listed[name]
            self._lines.add({"gone": name}, sync=False)
            self._reporter.note(f"{self.label} was damaged ({name} {wrong}): it is made again", passing=True)
        return wrong is None

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file to; the file is in the folder and in the list when the block ends well."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as fresh:
            yield fresh
            # Libraries write private files; the list has the mode that the user's mask gives.
            fresh.chmod(self._lines.path.stat().st_mode & 0o777)
            entry = {"file": name, "bytes": fresh.stat().st_size, "sha256": _hash(fresh)}
        self._list(entry)

    def add(self, name: str) -> None:
        """List a file that another library wrote into the folder."""
        file = self.path / name
        self._list({"file": name, "bytes": file.stat().st_size, "sha256": _hash(file)})

    def _list(self, entry: dict[str, Any]) -> None:
        self._lines.add(entry, sync=False)
        self._listed[entry["file"]] = entry
        self._right.add(entry["file"])
        self._waiting.append(self.path / entry["file"])
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file of plain values."""
        with self.writing(name) as fresh:
            fresh.write_text(json.dumps(value))

    def read_json(self, name: str) -> Any:
        """Read what `write_json` wrote."""
        return json.loads((self.path / name).read_text())

    def keep_note(self, text: str) -> None:
        """Keep a note with the files, for those who take them over."""
        if text not in self.notes:
            self.notes.append(text)
            self._lines.add({"note": text}, sync=False)

    def sync(self) -> None:
        """Wait until the files, their names and the list are on the disk itself."""
        for path in self._waiting:
            to_disk(path)
        to_disk(self._lines.path)
        for folder in dict.fromkeys([*(path.parent for path in self._waiting), self.path]):
            to_disk(folder)
        self._waiting.clear()
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Close the list: nothing is missing, and all of it is on the disk."""
        self._lines.add({"finished": len(self._listed)}, sync=False)
        self.finished = True
        self.sync()

    def damage(self) -> str | None:
        """What keeps a folder that was finished from being taken over; None for nothing."""
        if self.fault is not None:
            return self.fault
        if not self.finished:
            return f"{MANIFEST} has no end"
        for name in self.names():
            wrong = self.wrong_with(name)
            if wrong is not None:
                return f"{name} {wrong}"
        return None


def workspace(path: Path, label: str, reporter: Reporter) -> Folder:
    """A folder that only grows, opened to go on with it."""
    folder = Folder(path, label, reporter)
    clear_unfinished(path)
    if folder.fault is not None:
        reporter.note(f"{label} was damaged ({folder.fault}): what it does not list is made again", passing=True)
    return folder


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
