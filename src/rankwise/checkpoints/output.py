"""The directory that a run writes: known to be usable before anything is computed, written by one run at a time, and
there whole or as it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rankwise.errors import OutputError, is_disk_full
from rankwise.reading import UnreadableError, file_exists, one_line, parse_json, read_bytes
from rankwise.runs import to_disk, write_atomically

REPORT_FILE = "rankwise_report.json"
"""Every directory that rankwise writes holds this file; only such directories are ever replaced."""

FILES_FILE = "rankwise_files.json"
"""Names and sizes of what was written, by which files of the user are told from ours."""

_LONGEST_STEM = 100
"""Characters of the output's name in the names beside it, which are longer."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _foreign(folder: Path) -> str | None:
    """A file in a directory of ours that is not as it was written; None when there is none, or no list of them."""
    try:
        written = json.loads((folder / FILES_FILE).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(written, dict):
        return None
    for entry in sorted(folder.iterdir()):
        if entry.name != FILES_FILE and (not entry.is_file() or written.get(entry.name) != entry.stat().st_size):
            return entry.name
    return None


def listed(file: Path) -> Path:
    """Put a file that was written into a directory of ours on its list, so that it is not taken for one of the user.

    Args:
        file: there already, in a directory that has a list or none.

    Returns:
        The file.
    """
    known = file.parent / FILES_FILE
    try:
        written = json.loads(known.read_text())
    except (OSError, ValueError):
        return file
    if isinstance(written, dict):
        write_atomically(known, json.dumps({**written, file.name: file.stat().st_size}, indent=2) + "\n")
    return file


def made_from(report: Path) -> str | None:
    """The model that a result was made from, as its report names it; None where that cannot be read."""
    try:
        values = parse_json(read_bytes(report), finite=False)
    except UnreadableError:
        return None
    recipe = values.get("recipe") if isinstance(values, dict) else None
    named = recipe.get("model") if isinstance(recipe, dict) else None
    return named if isinstance(named, str) else None


def same_model(one: str, other: str) -> bool:
    """Whether two names of models mean one: the same hub name, or paths to the same directory."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def check_model(report: Path, model: str) -> None:
    """Raise when a result that is there was made from another model, or nobody can say from which.

    Args:
        report: the file that names the model of a result; none needs to be there.
        model: directory or hub name of the model whose result would take its place.

    Raises:
        OutputError: naming the model of the result.
    """
    if not file_exists(report):
        return
    named = made_from(report)
    if named is not None and same_model(named, model):
        return
    whose = f"of another model, {one_line(named)}" if named is not None else "whose report names no model"
    raise OutputError(
        f"The output holds a result {whose}; it is left alone.",
        where=str(report.parent),
        remedy="give another --output, or --overwrite to replace it",
    )


def check_output(output: Path, keep: Mapping[str, Path], model: str | None = None) -> None:
    """Raise when `output` cannot become ours, before anything is computed.

    Args:
        output: a directory, there or not. A link stands for what it points to.
        keep: by what it is called, what must not lie in the output: the model, the finished stages.
        model: directory or hub name that the result will be made from: a result of another one is not replaced. None
            replaces the result of any.

    Raises:
        OutputError: saying what is there, what would be lost, or why nothing can be written there.
    """
    try:
        target = output.resolve()
        for what, path in keep.items():
            if path.resolve().is_relative_to(target):
                raise OutputError(
                    f"The output would replace {what}, which is at {path}.",
                    where=str(output),
                    remedy="give another --output",
                )
        _check_what_is_there(output, target)
        if model is not None:
            check_model(target / REPORT_FILE, model)
        _check_place(output, target)
    except (OSError, RuntimeError, ValueError) as problem:  # a name too long, links in a circle, a zero byte
        raise OutputError(
            f"The output cannot be written there ({getattr(problem, 'strerror', problem)}).",
            where=str(output),
            remedy="give another --output, or check the permissions of the directory above it",
        ) from None


def _check_what_is_there(output: Path, target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError("The output path is a file.", where=str(output), remedy="give a directory")
    if os.path.ismount(target):
        raise OutputError(
            "The output is a mount point, which cannot be replaced as a whole.",
            where=str(output),
            remedy="give a directory inside it",
        )
    if any(target.iterdir()) and not (target / REPORT_FILE).exists():
        raise OutputError(
            "The output directory exists and was not written by rankwise; it is left alone.",
            where=str(output),
            remedy="give another --output, or empty it yourself",
        )
    added = _foreign(target)
    if added is not None:
        raise OutputError(
            f"The output directory holds {added!r}, which rankwise did not write so; it is left alone.",
            where=str(output),
            remedy="give another --output, or move that file away",
        )


def _check_place(output: Path, target: Path) -> None:
    """Try what `writing` will do: a directory beside the output that is renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(target)
    moved = fresh.with_name(f"{fresh.name}.moved")
    try:
        os.rename(fresh, moved)
        fresh = moved
        if not target.exists():
            # The name itself: too long, or not one that this file system takes.
            os.rename(moved, target)
            fresh = target
    finally:
        fresh.rmdir()


def _stem(target: Path) -> str:
    """What the names beside an output begin with; no two outputs of one directory share it."""
    name = target.name
    if len(name) > _LONGEST_STEM:
        name = f"{name[:_LONGEST_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f".{name}"


def _beside(target: Path) -> Path:
    """A fresh directory beside the output, with a name of its own and the mode of any directory."""
    fresh = Path(tempfile.mkdtemp(prefix=f"{_stem(target)}.partial-", dir=target.parent))
    fresh.chmod(0o777 & ~_umask())
    return fresh


@contextmanager
def reserved(output: Path | None) -> Iterator[None]:
    """Hold an output, if there is one, for as long as the block runs, so that two runs never write one directory.

    Raises:
        OutputError: when another process holds it.
    """
    if output is None:
        yield
        return
    target = output.resolve()
    lock = target.with_name(f"{_stem(target)}.lock")
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(
                "Another run is writing this output.",
                where=str(output),
                remedy="wait for it to end, or give another --output",
            ) from None
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # the run that held it has just ended and taken its lock away
    try:
        _tidy(target)
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _tidy(target: Path) -> None:
    """Put right what a killed run left beside an output that nobody else holds."""
    old = target.with_name(f"{_stem(target)}.old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    partial = re.compile(re.escape(_stem(target)) + r"\.partial-[a-z0-9_]{8}(\.moved)?")
    for left in target.parent.iterdir():
        if left == old or partial.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output`, which is reserved, that takes its place when the block ends well.

    Raises:
        OutputError: when the disk is full or not writable; `output` is then as it was.
    """
    target = output.resolve()
    fresh: Path | None = None
    try:
        fresh = _beside(target)
        yield fresh
        for file in fresh.iterdir():
            # Weight files come out private; give them the mode of every other file.
            file.chmod(0o666 & ~_umask())
        written = {file.name: file.stat().st_size for file in sorted(fresh.iterdir())}
        (fresh / FILES_FILE).write_text(json.dumps(written, indent=2) + "\n")
        # Survive a power cut too: the contents reach the disk before the name does.
        for path in [*fresh.iterdir(), fresh]:
            to_disk(path)
        old = target.with_name(f"{_stem(target)}.old")
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
        shutil.rmtree(old, ignore_errors=True)
        to_disk(target.parent)
    except BaseException as problem:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(problem, OSError) or "os error" in str(problem).lower():
            full = is_disk_full(problem)
            raise OutputError(
                "The disk is full." if full else f"The checkpoint cannot be written ({problem}).",
                where=str(output),
                remedy="make room and run the same command again; finished stages are kept"
                if full
                else "check the path and its permissions",
            ) from problem
        raise
