"""`Crew`: who does the jobs of a run. Here it is this process; `runs/on_ray.py` has workers elsewhere.

A job is the name of a function, plain values, and the files of the run that it reads. What comes back are plain values,
notes and files. No weight is ever sent: a worker loads the model itself.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        function: `module:name`. It is called with what its worker holds, a folder to write files into, and the
            arguments.
        arguments: plain values by name.
        reads: files that it reads, below the run directory.
        label: what is done, for people.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[Path, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Done:
    """What came of a job.

    Attributes:
        value: what its function returned.
        files: by name below the folder it wrote into: where they are until the next result is asked for, or their
            contents.
    """

    value: Any
    files: Mapping[str, Path | bytes]

    def put(self, name: str, path: Path) -> None:
        """Bring a file to its place.

        Args:
            name: as the job named it.
            path: where it goes, on the disk of the run.
        """
        found = self.files[name]
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            shutil.move(found, path)


def function_named(name: str) -> Callable[..., Any]:
    """The function that a job names, `module:name`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def written(folder: Path) -> dict[str, Path]:
    """The files that a job wrote, by their names below its folder."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Crew(ABC):
    """Who does jobs. A context manager: at its end nothing of it is left.

    Attributes:
        workers: how many jobs are done at a time.
    """

    workers: int = 1

    @abstractmethod
    def results(self, jobs: Iterable[Job], ahead: int | None = None) -> Iterator[Done]:
        """Do jobs, and give what came of them in their order.

        Args:
            jobs: taken one by one, a job no sooner than the result of the one `ahead` places before it was given.
            ahead: how many are taken before the first result; as many as there are workers by default.

        Raises:
            RankwiseError: as the function of a job raised it.
        """

    @abstractmethod
    def close(self) -> None:
        """End what was begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Here(Crew):
    """This process, one job at a time, or some at once.

    Args:
        held: what functions of jobs are called with; closed at the end where it can be.
        directory: of the run, where files are written for the moment.
        at_once: how many jobs are done at a time, each in a thread: for jobs that are many short steps, none of which
            has use for more than a core, and that change nothing of what is held.
    """

    def __init__(self, held: Any, directory: Path, at_once: int = 1) -> None:
        self._held, self._directory, self.workers = held, directory, at_once

    def results(self, jobs: Iterable[Job], ahead: int | None = None) -> Iterator[Done]:
        if self.workers > 1:
            yield from self._side_by_side(iter(jobs), max(ahead or 0, self.workers))
            return
        for job in jobs:
            with self._folder() as name:
                yield self._do(job, Path(name))

    def _side_by_side(self, jobs: Iterator[Job], ahead: int) -> Iterator[Done]:
        with ThreadPoolExecutor(self.workers) as threads, ExitStack() as folders:
            begun: deque[tuple[ExitStack, Future[Done]]] = deque()

            def begin(count: int) -> None:
                for job in islice(jobs, count):
                    own = folders.enter_context(ExitStack())
                    begun.append((own, threads.submit(self._do, job, Path(own.enter_context(self._folder())))))

            try:
                begin(ahead)
                while begun:
                    own, future = begun.popleft()
                    yield future.result()
                    own.close()
                    begin(1)
            finally:
                # What has not begun never does; what runs is waited for, its folder still there.
                threads.shutdown(cancel_futures=True)

    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self._directory)

    def _do(self, job: Job, folder: Path) -> Done:
        return Done(function_named(job.function)(self._held, folder, **job.arguments), written(folder))

    def close(self) -> None:
        close = getattr(self._held, "close", None)
        if close is not None:
            close()


SCRATCH = ".work-"
"""How the names of folders begin that jobs write into."""

SEEN = ".seen-"
"""How the names of files begin by which workers know whether they see a run directory."""


def clear_scratch(directory: Path) -> None:
    """Delete what killed jobs left in a run directory that no other process works in."""
    for left in directory.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    for seen in directory.glob(f"{SEEN}*"):
        seen.unlink(missing_ok=True)
