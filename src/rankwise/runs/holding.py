"""One process at a time in a directory, and what is said when work in it ends before its end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rankwise.errors import RankwiseError, RunError, is_disk_full

LOCK = ".lock"

_NO_ROOM = 1 << 20
"""Free bytes below which a library that could not write, and does not say why, found the disk full."""


@contextmanager
def locked(directory: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Hold a directory for the length of the block.

    Args:
        directory: which; made if absent.
        taken: called when another process holds it; returns to wait for that one, or raises.

    Raises:
        RunError: where there are no locks.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOCK).open("a") as file:
            _take(file, directory, taken)
            # One that waited may hold the lock of a directory that the other has deleted.
            if _is_at(file, directory / LOCK):
                yield
                return


def _take(file: IO[str], directory: Path, taken: Callable[[], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as problem:
        raise RunError(
            f"The file system has no locks ({problem.strerror}).", where=str(directory), remedy="give another directory"
        ) from None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


@contextmanager
def keeping(directory: Path, kept: Callable[[], str], say: Callable[[str], None], elsewhere: str) -> Iterator[None]:
    """Say what is kept when the block is stopped (by ^C, or by SIGTERM where that raises) or finds the disk full.

    Args:
        directory: where the work is.
        kept: tells what of it is kept.
        say: told that when the block is stopped.
        elsewhere: how another directory is given.

    Raises:
        RunError: when the disk is full, or a file of the directory cannot be read or written.
    """
    try:
        yield
    except BaseException as problem:
        if not isinstance(problem, Exception):
            say(f"stopped: {kept()}; the same command goes on from there")
            raise
        if isinstance(problem, RankwiseError):
            raise
        if not _is_full(problem, directory):
            if not _is_within(problem, directory):
                raise
            raise RunError(
                f"A file of an earlier run cannot be read or written ({getattr(problem, 'strerror', problem)}).",
                where=str(getattr(problem, "filename", directory)),
                remedy=f"see to whom it belongs, or {elsewhere}",
            ) from problem
        raise RunError(
            f"The disk is full: {kept()}.",
            where=str(directory),
            remedy=f"make room, or {elsewhere}, and run the same command again",
        ) from problem


def _is_within(problem: BaseException, directory: Path) -> bool:
    """Whether an error is of a file in the directory."""
    file = getattr(problem, "filename", None)
    return isinstance(problem, OSError) and isinstance(file, str | os.PathLike) and directory in Path(file).parents


def _is_full(problem: Exception, directory: Path) -> bool:
    if is_disk_full(problem):
        return True
    # torch says that it failed to write, and not why.
    failed = isinstance(problem, OSError) or "writ" in str(problem)
    return failed and shutil.disk_usage(directory).free < _NO_ROOM
