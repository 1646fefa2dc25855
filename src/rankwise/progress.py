"""What a run tells its user while it works: stages, progress and notes.

Everything goes to standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_SHOW_AFTER_SECONDS = 2.0
_SAMPLE_SECONDS = 0.05

_LINE_EVERY_SECONDS = 30.0
"""Between lines of progress where there is no terminal for a bar."""


def _reset_peak_memory() -> bool:
    """Set this process's peak resident size back to its current size; True when the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    """A size that Linux tells of this process, in bytes; None elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_memory_bytes() -> int:
    """Peak resident memory in bytes, since the last reset where the system allows one, else since the start."""
    known = _status_bytes("VmHWM")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int | None:
    """Resident memory of this process that no file stands behind, in bytes; None where the system does not say."""
    return _status_bytes("RssAnon")


def _gpu(ask: str) -> list[Any]:
    """What PyTorch answers of memory for every GPU; nothing where this process has used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [getattr(torch.cuda, ask)(number) for number in range(torch.cuda.device_count())]


def gpu_peak_bytes() -> int | None:
    """Most memory that tensors took on GPUs since the last stage began, in bytes; None where none was used."""
    return sum(_gpu("max_memory_allocated")) or None


def give_back_memory() -> None:
    """Give the system what was freed.

    The GNU C library keeps what lies between pieces in use: half a gigabyte after the sums of a few large blocks. Other
    libraries give it back by themselves, or cannot be asked.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _Sampler:
    """Looks at a process's own memory twenty times a second."""

    def __init__(self) -> None:
        self.most = anonymous_bytes()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if self.most is not None:
            self._thread.start()

    def _look(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.most = max(self.most or 0, anonymous_bytes() or 0)

    def stop(self) -> int | None:
        """The most that was seen."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return self.most


@dataclass(frozen=True)
class StageTime:
    """What a stage took.

    Attributes:
        seconds: by the clock.
        peak_memory_bytes: most resident memory.
        peak_is_of_this_stage: False where the system gives the peak since the start of the process alone.
        anonymous_bytes: most memory seen that no file stands behind: what mapped files take can be taken back at any
            time. None where the system does not say.
        taken_over: whether all that it makes was there already, from an earlier run.
        gpu_bytes: most that tensors took on GPUs; None where none was used.
    """

    seconds: float
    peak_memory_bytes: int
    peak_is_of_this_stage: bool
    anonymous_bytes: int | None = None
    taken_over: bool = False
    gpu_bytes: int | None = None


class Reporter:
    """Collects notes and stage timings, and shows progress on a terminal.

    `current` names the stage that is being worked on, or that failed; `facts` has what an error should say of the run.

    Args:
        show: draw progress bars and print notes. None means: only when standard error is a terminal for bars; notes
            are always printed unless `show` is False.
        lines: where there is no terminal, print a line a stage, and one now and then while it is worked on.
    """

    def __init__(self, show: bool | None = None, *, lines: bool = False) -> None:
        self.notes: list[str] = []
        self.stages: dict[str, StageTime] = {}
        self._keepers: list[Callable[[str], None]] = []
        self.facts: dict[str, str] = {}
        self.current: str | None = None
        self._print_notes = show is not False
        self._text: str | None = None
        self._bars = sys.stderr.isatty() if show is None else show
        self._lines = lines and show is None and not self._bars
        self._taken = self._made = 0
        self._retell: Callable[[str], None] | None = None

    def __reduce__(self) -> tuple[type[Reporter], tuple[bool]]:
        """What is sent to another process says nothing there."""
        return Reporter, (False,)

    def note(self, text: str, *, passing: bool = False) -> None:
        """Say something the user should know, once, and keep it for the report.

        Args:
            text: what.
            passing: whether it is of this call alone, such as what it takes over; then no stage keeps it.
        """
        if not passing:
            for keep in self._keepers:
                keep(text)
        if text in self.notes:
            return
        self.notes.append(text)
        if self._print_notes:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Say something that is of this call alone and of no report."""
        if self._print_notes:
            print(text, file=sys.stderr, flush=True)

    def beside(self, text: str) -> None:
        """Say what is being done between two steps of the current count, such as by workers elsewhere."""
        if self._retell is not None:
            self._retell(text)

    @contextmanager
    def keeping(self, keep: Callable[[str], None]) -> Iterator[None]:
        """Hand every note of the block to `keep` too, those that were said before as well."""
        self._keepers.append(keep)
        try:
            yield
        finally:
            self._keepers.remove(keep)

    def took_over(self) -> None:
        """Count a result of the current stage that was there already."""
        self._taken += 1

    def makes(self) -> None:
        """Count a result of the current stage that is made in this run."""
        self._made += 1

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage on the terminal and time it; records seconds and peak resident memory under `name`."""
        give_back_memory()
        resets = _reset_peak_memory()
        _gpu("reset_peak_memory_stats")
        started, sampler = time.monotonic(), _Sampler()
        if self._bars or self._lines:
            print(f"{name} ...", file=sys.stderr, flush=True)
        self._taken = self._made = 0
        outer, self.current = self.current, name
        try:
            yield
            # Where the block fails, the stage stays the current one, for the error to name.
            self.current = outer
        finally:
            took = round(time.monotonic() - started, 2)
            taken_over = self._taken > 0 and self._made == 0
            self.stages[name] = StageTime(
                took, peak_memory_bytes(), resets, sampler.stop(), taken_over, gpu_peak_bytes()
            )

    @contextmanager
    def counting(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A progress bar whose text changes: how far, how long left, and what came out last.

        Args:
            description: the first text.
            total: steps in all.
            done: steps an earlier, interrupted run finished.

        Yields:
            A function to call with a new text after each step.
        """
        steps = self.track(range(done, total), description, total=total, done=done)
        next(steps, None)

        def advance(text: str) -> None:
            self._text = text
            next(steps, None)

        try:
            yield advance
        finally:
            self._text = None
            steps.close()

    def track(self, items: Sequence[T] | Iterable[T], description: str, total: int, done: int = 0) -> Generator[T]:
        """Iterate with a progress bar: what, how far, how long left. Appears only for work longer than two seconds.

        Args:
            items: what is left to do.
            description: what is being done.
            total: number of items in all.
            done: number of items finished by an earlier, interrupted run.
        """
        if not self._bars:
            yield from self._told(items, description, total, done) if self._lines else items
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task(description, total=total, completed=done)
        started = time.monotonic()
        shown = False

        def show() -> None:
            nonlocal shown
            if not shown and time.monotonic() - started > _SHOW_AFTER_SECONDS:
                bar.start()
                shown = True

        def retell(text: str) -> None:
            bar.update(task, description=f"{self._text or description} ({text})")
            show()

        outer, self._retell = self._retell, retell
        try:
            for item in items:
                yield item
                bar.update(task, advance=1, description=self._text or description)
                show()
        finally:
            self._retell = outer
            if shown:
                bar.stop()

    def _told(self, items: Iterable[T], description: str, total: int, done: int) -> Generator[T]:
        """Iterate, and print how far it is now and then."""
        said, number = time.monotonic(), done

        def say(text: str) -> None:
            nonlocal said
            if number < total and time.monotonic() - said >= _LINE_EVERY_SECONDS:
                print(f"{self._text or description}: {number} of {total}{text}", file=sys.stderr, flush=True)
                said = time.monotonic()

        outer, self._retell = self._retell, lambda text: say(f" ({text})")
        try:
            for item in items:
                yield item
                number += 1
                say("")
        finally:
            self._retell = outer
