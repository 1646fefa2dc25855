"""The one place where whatever a command ends with becomes text for a person and an exit status."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rankwise.cli.common import last_reporter
from rankwise.errors import RankwiseError, is_disk_full
from rankwise.reading import one_line
from rankwise.version import __version__

WRONG_INPUT = 2
"""Exit status where the user can mend it."""

UNFORESEEN = 70
"""Exit status where the program failed: nobody foresaw it."""

STOPPED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
NO_READER = 128 + signal.SIGPIPE


class _Terminated(BaseException):
    """The system asked the process to end."""


def run_guarded(command: Callable[[], Any]) -> int:
    """Run a command to its end, whatever that is.

    Args:
        command: may raise anything.

    Returns:
        The exit status: 0, what the command asked for, 2 for what the user can mend, 70 for what nobody foresaw, and
        128 with the signal's number where one ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name that the terminal's encoding has no signs for is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        with _termination_raises():
            status = _status_of(command)
            # What is printed at the very end would fail where nothing catches it.
            sys.stdout.flush()
        # typer makes of a stop at the keyboard an exit with this status and no word.
        return _stopped(STOPPED) if status == STOPPED else status
    except KeyboardInterrupt:
        return _stopped(STOPPED)
    except _Terminated:
        return _stopped(TERMINATED)
    except BrokenPipeError:
        return _without_reader()
    except RankwiseError as problem:
        _say(f"error: {problem}")
        return WRONG_INPUT
    except Exception as problem:
        if is_disk_full(problem):
            where = getattr(problem, "filename", None)
            _say("error: The disk is full." + (f"\n  where: {where}" if where else "") + "\n  do:    make room")
            return WRONG_INPUT
        return _unforeseen(problem)


def _status_of(command: Callable[[], Any]) -> int:
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Let a request to end unwind the stack, as a stop at the keyboard does, so that what is open is closed."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    """Print to standard error, whatever the text holds: control characters would steer the terminal."""
    shown = "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
    with contextlib.suppress(OSError, ValueError):
        print(shown.encode("utf-8", "replace").decode(), file=sys.stderr, flush=True)


def _stopped(status: int) -> int:
    reporter = last_reporter()
    kept = reporter.facts.get("run directory") if reporter is not None else None
    _say("stopped; the same command continues from the stages that are finished" + (f" in {kept}" if kept else ""))
    return status


def _without_reader() -> int:
    """Whoever read the output went away: end without a word."""
    with contextlib.suppress(OSError, ValueError):
        # What is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NO_READER


def _unforeseen(problem: Exception) -> int:
    """Tell a person of a failure that nobody foresaw: where it was, and in which file all of it is."""
    reporter = last_reporter()
    facts = dict(reporter.facts) if reporter is not None else {}
    stage = reporter.current if reporter is not None else None
    place = ", ".join(
        f"{name} {text}" for name, text in (("stage", stage), ("architecture", _architecture(facts))) if text
    )
    file = _written(_details(problem, stage, facts), facts.get("run directory"))
    what = f"{type(problem).__name__}: {one_line(problem)}"
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    lines = [f"error: Something failed that rankwise did not foresee ({what})."]
    lines.append(f"  where: {place or 'before the first stage'}")
    if isinstance(problem, MemoryError) or "out of memory" in str(problem).lower():
        lines.append("  do:    free memory, or use a smaller batch size or model; if there is enough, report it")
    if file is not None:
        lines.append(f"  do:    please report this, with the file {file}")
    else:
        lines.append(f"  do:    please report this; no file could be written ({frame.name}, line {frame.lineno})")
    if "run directory" in facts:
        lines.append(f"         finished stages are kept in {facts['run directory']}")
    _say("\n".join(lines))
    return UNFORESEEN


def _architecture(facts: dict[str, str]) -> str | None:
    """Class name of the model, from the run or, where it was not loaded yet, from its config."""
    if "architecture" in facts:
        return facts["architecture"]
    try:
        from rankwise.checkpoints.verify import read_config

        named = read_config(Path(facts["model"])).get("architectures") or []
        return str(named[0])
    except Exception:  # it is a help, and no help may fail in its turn
        return None


def _details(problem: Exception, stage: str | None, facts: dict[str, str]) -> str:
    """All that whoever mends it needs: versions, the command, where it was, and the traceback."""
    versions = {"rankwise": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "transformers"):
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    reporter = last_reporter()
    parts = [f"{name}: {text}" for name, text in versions.items()]
    parts += [f"command: {sys.argv}", f"stage: {stage}", *(f"{name}: {text}" for name, text in facts.items())]
    parts += [f"architecture by its config: {_architecture(facts)}"]
    parts += [f"note: {note}" for note in (reporter.notes if reporter is not None else [])]
    return "\n".join([*parts, "", "".join(traceback.format_exception(problem))])


def _written(text: str, run_directory: str | None) -> Path | None:
    """The file that holds the details, in the run's directory or, failing that, in the one for temporary files."""
    name = f"rankwise-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in filter(None, (run_directory, tempfile.gettempdir())):
        try:
            file = Path(folder) / name
            with file.open("x", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
            return file
        except (OSError, ValueError):
            continue
    return None
