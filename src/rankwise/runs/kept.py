"""What runs have left in the user's cache: one folder a model, which can be listed and deleted."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import RunError, nearest
from rankwise.runs.holding import LOCK, locked
from rankwise.runs.run import cache_root

_DAY = 86_400


@dataclass(frozen=True)
class KeptRun:
    """The finished stages of runs on one model.

    Attributes:
        folder: where they are; its name is the model's.
        size: bytes on disk.
        stages: finished ones, and such as are begun.
        used: seconds since the epoch when a file in it was last written.
    """

    folder: Path
    size: int
    stages: int
    used: float

    @property
    def days(self) -> float:
        """Since it was last written to."""
        return max(0.0, (time.time() - self.used) / _DAY)


def kept_runs() -> list[KeptRun]:
    """All run directories in the cache, the largest first. A folder that no run has locked is none."""
    root = cache_root()
    if not root.is_dir():
        return []
    found = [_measured(folder) for folder in root.iterdir() if folder.is_dir() and (folder / LOCK).is_file()]
    return sorted(found, key=lambda kept: (-kept.size, kept.folder.name))


def _measured(folder: Path) -> KeptRun:
    size, used = 0, folder.stat().st_mtime
    for file in _files(folder):
        try:
            found = file.lstat()
        except OSError:
            continue  # A run that is going on has renamed it.
        # What a sparse file does not take is not counted.
        size += min(found.st_size, 512 * found.st_blocks)
        used = max(used, found.st_mtime)
    stages = sum(each.is_dir() and not each.name.startswith(".") for each in folder.iterdir())
    return KeptRun(folder, size, stages, used)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def kept_named(names: Sequence[str]) -> list[KeptRun]:
    """Those of some names, as `kept_runs` lists them.

    Raises:
        RunError: naming the nearest one for a name that is not there.
    """
    known = {kept.folder.name: kept for kept in kept_runs()}
    for name in names:
        if name not in known:
            remedy = nearest(name, known) if known else "nothing is kept there"
            raise RunError(f"Nothing is kept of {name!r}.", where=str(cache_root()), remedy=remedy)
    return [known[name] for name in dict.fromkeys(names)]


def delete_kept(runs: Sequence[KeptRun], busy: Callable[[KeptRun], None]) -> list[KeptRun]:
    """Delete run directories; those in which a run works are left alone.

    Args:
        runs: which.
        busy: told of each that is left.

    Returns:
        Those that were deleted.

    Raises:
        RunError: when one cannot be deleted.
    """
    deleted = []
    for kept in runs:

        def taken(kept: KeptRun = kept) -> None:
            raise _BusyError(kept)

        try:
            with locked(kept.folder, taken):
                shutil.rmtree(kept.folder)
        except _BusyError:
            busy(kept)
            continue
        except OSError as problem:
            raise RunError(
                f"It cannot be deleted ({problem.strerror}).",
                where=str(problem.filename or kept.folder),
                remedy="see to whom it belongs",
            ) from None
        deleted.append(kept)
    return deleted


class _BusyError(Exception):
    """A run works in it."""
