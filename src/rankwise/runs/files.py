"""Small tools for files: written whole or not at all, brought to the disk, space taken before it is used."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rankwise.errors import RunError, is_disk_full

_FRESH = ".new"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of its own beside `path`, for a file or a new folder; it becomes `path` when the block ends well."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_FRESH}")
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        if fresh.is_dir():
            shutil.rmtree(fresh)
        fresh.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(text)


def clear_unfinished(folder: Path) -> None:
    """Delete what killed processes left of files they were writing."""
    for left in folder.glob(f".*{_FRESH}"):
        if left.is_file():
            left.unlink()


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_writable(folder: Path, remedy: str) -> None:
    """Make a folder if it is absent, and find out now rather than after hours that it cannot be written.

    Args:
        folder: which.
        remedy: what to do when it cannot.

    Raises:
        RunError: saying why it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as problem:
        full = is_disk_full(problem)
        raise RunError(
            "The disk is full." if full else f"The directory cannot be written ({problem.strerror}).",
            where=str(folder),
            remedy=f"make room, or {remedy}" if full else remedy,
        ) from None


def _reserve(file: IO[bytes], size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # Neither every system nor every file system has it.
        for start in range(0, size, 1 << 24):
            file.write(bytes(min(1 << 24, size - start)))


def take_space(path: Path, size: int) -> None:
    """Make a file of so many bytes and take its space on the disk: a mapped file that cannot grow ends the process.

    Args:
        path: of the file; replaced.
        size: in bytes.

    Raises:
        RunError: when the disk has less.
    """
    try:
        with path.open("wb") as file:
            _reserve(file, size)
    except OSError as problem:
        path.unlink(missing_ok=True)
        if not is_disk_full(problem):
            raise
        raise RunError(
            f"The disk is full: {size / 1e9:.3g} GB are needed for what does not stay in memory.",
            where=str(path.parent),
            remedy="make room, give a --run-dir elsewhere, or let more stay in memory (--memory whole, "
            "repair.refit.memory, repair.blocks.memory); finished stages and blocks are kept, and the same command "
            "goes on from them",
        ) from None
