"""`Run`: a directory of finished stages, each named by a hash of what it depends on.

A stage is worked on under `NAME-KEY.partial` and renamed to `NAME-KEY` when it is complete. Its files are listed with
their hashes, and so are the notes that were made of it: what is taken over is what was written, and says what was said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RunError
from rankwise.progress import Reporter
from rankwise.runs.executor import clear_scratch
from rankwise.runs.files import make_writable, to_disk
from rankwise.runs.folder import MANIFEST, Folder, workspace
from rankwise.runs.holding import keeping, locked


def stage_key(depends_on: Mapping[str, Any]) -> str:
    """Hash of a JSON-able description of everything a stage's result depends on."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:20]


def cache_root() -> Path:
    """Where stages are kept by default: `RANKWISE_CACHE`, else the user's cache folder."""
    return Path(
        os.environ.get("RANKWISE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"
    )


def default_run_directory(model: str) -> Path:
    """Where those of one model are kept by default: a folder of its own."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
    return cache_root() / name


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        folder: where the finished stage is.
        partial: where it is being made; may hold what a killed run finished.
        key: hash of what it depends on.
        reporter: told what is damaged, and the notes of what is taken over.
    """

    folder: Path
    partial: Path
    key: str
    reporter: Reporter

    @property
    def label(self) -> str:
        return self.folder.name

    def taken_over(self) -> bool:
        """Whether the stage is finished and as it was written; then its notes are made again.

        A damaged one is said and deleted, so that it is made again.

        Raises:
            RunError: when a damaged one cannot be deleted.
        """
        if not os.path.lexists(self.folder):
            return False
        try:
            found = Folder(self.folder, self.label, self.reporter)
            damage = found.damage()
        except OSError as problem:
            found, damage = None, f"it cannot be read: {problem.strerror}"
        if found is None or damage is not None:
            self.reporter.note(f"stage {self.label} was damaged ({damage}) and is made again", passing=True)
            _delete(self.folder)
            return False
        for note in found.notes:
            self.reporter.note(note)
        self.reporter.took_over()
        return True

    @contextmanager
    def making(self) -> Iterator[Folder]:
        """The folder to fill. It becomes the finished stage when the block ends well; if not, it can be continued.

        Notes made inside the block are kept with it.
        """
        self.reporter.makes()
        folder = _opened(self.partial, self.label, self.reporter)
        for note in folder.notes:
            self.reporter.note(note)
        with self.reporter.keeping(folder.keep_note):
            yield folder
        folder.finish()
        os.rename(self.partial, self.folder)
        to_disk(self.folder.parent)

    def begun(self) -> Folder:
        """The folder that `making` will go on with: to fill several stages at a time."""
        return _opened(self.partial, self.label, self.reporter)

    def workspace(self) -> Folder:
        """The folder of a stage that is never finished but only grows."""
        return _opened(self.folder, self.label, self.reporter)

    def log(self, name: str) -> Path:
        """Where a stage that is one growing file, such as a log of trials, is or will be; one that is gone is said."""
        file = self.folder / name
        if self.folder.is_dir() and not (file.exists() and file.stat().st_size):
            self.reporter.note(
                f"stage {self.label} was damaged ({name} is missing or empty) and is made again", passing=True
            )
        return file

    def discard(self) -> None:
        """Delete what was left unfinished."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _opened(path: Path, label: str, reporter: Reporter) -> Folder:
    """A folder that is gone on with; what is no folder, or has something else where its list belongs, is in the way."""
    if os.path.lexists(path) and not path.is_dir():
        _delete(path)
    if (path / MANIFEST).is_dir():
        _delete(path / MANIFEST)
    return workspace(path, label, reporter)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as problem:
        raise RunError(
            f"A damaged stage cannot be deleted ({problem.strerror}).",
            where=str(path),
            remedy="delete it, or give another directory with --run-dir",
        ) from None


def _is_begun(file: Path) -> bool:
    """Whether a file is work that will be gone on with, and no list or scratch."""
    return file.is_file() and file.name != MANIFEST and file.parent.name != "hidden"


class Run:
    """Stages under one directory. One process at a time: a second one waits.

    Args:
        directory: made if absent.
        reporter: told what is kept when the run is stopped.

    Attributes:
        closing: what is ended when the directory is let go.

    Raises:
        RunError: when the directory cannot be made or written.
    """

    def __init__(self, directory: Path, reporter: Reporter | None = None) -> None:
        self.directory = directory
        self._reporter = reporter or Reporter(show=False)
        self.closing = ExitStack()
        make_writable(directory, "give another directory for finished stages with --run-dir, or set RANKWISE_CACHE")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; says once that another process holds it.

        Raises:
            RunError: when the disk fills up inside the block. What was finished stays.
        """

        def say(text: str) -> None:
            self._reporter.note(text, passing=True)

        def waiting() -> None:
            say(f"waiting for another process that works in {self.directory}")

        with locked(self.directory, waiting), keeping(self.directory, self.kept, say, "give a --run-dir elsewhere"):
            clear_scratch(self.directory)
            with self.closing:
                yield

    def kept(self) -> str:
        """What is there, for a user: how many stages, and how many files of those that are not finished."""
        stages = [path for path in self.directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
        half = [path for path in stages if path.suffix == ".partial"]
        files = sum(1 for path in half for file in path.rglob("*") if _is_begun(file))
        begun = f" and {files} files of those that were begun" if files else ""
        return f"{len(stages) - len(half)} stages{begun} are kept in {self.directory}"

    def stage(self, name: str, depends_on: Mapping[str, Any], reporter: Reporter | None = None) -> Stage:
        """The stage with this name and these dependencies, finished or not.

        Args:
            name: what it is.
            depends_on: all that its result depends on.
            reporter: told about it; the run's own by default.
        """
        key = stage_key(depends_on)
        label = f"{name}-{key}"
        return Stage(self.directory / label, self.directory / f"{label}.partial", key, reporter or self._reporter)

    def clear(self) -> None:
        """Delete every stage."""
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
