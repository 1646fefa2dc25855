"""`Run`: a directory of finished stages, each named by a hash of what it depends on.

A stage is worked on under `NAME-KEY.partial` and renamed to `NAME-KEY` when it is complete, so what is found under its
final name is whole, whenever the process was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError, RunError, is_disk_full


def stage_key(depends_on: Mapping[str, Any]) -> str:
    """Hash of a JSON-able description of everything a stage's result depends on."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:20]


def default_run_directory(model: str) -> Path:
    """Where stages are kept by default: `RANKWISE_CACHE`, else the user's cache folder; one folder a model."""
    root = (
        os.environ.get("RANKWISE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"
    )
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
    return Path(root) / name


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        folder: where the finished stage is.
        partial: where it is being made; may hold what a killed run finished.
        key: hash of what it depends on.
    """

    folder: Path
    partial: Path
    key: str

    @property
    def done(self) -> bool:
        return self.folder.is_dir()

    @contextmanager
    def making(self) -> Iterator[Path]:
        """The folder to fill. It becomes the finished stage when the block ends well; if not, it can be continued."""
        self.partial.mkdir(parents=True, exist_ok=True)
        yield self.partial
        os.rename(self.partial, self.folder)

    def workspace(self) -> Path:
        """The folder of a stage that is never finished but only grows, such as a log of trials."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def discard(self) -> None:
        """Delete what was left unfinished."""
        shutil.rmtree(self.partial, ignore_errors=True)


class Run:
    """Stages under one directory. One process at a time: a second one waits.

    Args:
        directory: made if absent.

    Raises:
        RunError: when the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".lock").touch()
        except OSError as problem:
            raise RunError(
                f"The directory for finished stages cannot be written ({problem.strerror}).",
                where=str(directory),
                remedy="give another with --run-dir, or set RANKWISE_CACHE",
            ) from None

    @contextmanager
    def locked(self, waiting: Any) -> Iterator[None]:
        """Hold the directory; calls `waiting` once when another process holds it.

        Raises:
            RunError: when the disk fills up inside the block. What was finished stays.
        """
        with (self.directory / ".lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            except Exception as problem:
                if isinstance(problem, RankwiseError) or not is_disk_full(problem):
                    raise
                raise RunError(
                    "The disk is full.",
                    where=str(self.directory),
                    remedy="make room, or give a --run-dir elsewhere, and run the same command again",
                ) from problem

    def stage(self, name: str, depends_on: Mapping[str, Any]) -> Stage:
        """The stage with this name and these dependencies, finished or not."""
        key = stage_key(depends_on)
        label = f"{name}-{key}"
        return Stage(self.directory / label, self.directory / f"{label}.partial", key)

    def clear(self) -> None:
        """Delete every stage."""
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)
