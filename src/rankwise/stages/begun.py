"""The folder of a fine-tuning beside its output: settings, checkpoints of the training, and one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import RunError
from rankwise.progress import Reporter
from rankwise.runs import Folder, keeping, make_writable, replacing

SETTINGS_FILE = "settings.json"

_BEGUN = "begun"
"""A finished folder with the settings, there once training has begun."""

_LABEL = "the training for this output"

_REMEDY = "give another --output"


@contextmanager
def training_folder(output: Path, reporter: Reporter) -> Iterator[Path]:
    """The folder for the training of an output that is reserved.

    Args:
        output: where the checkpoint goes.
        reporter: told what is kept when the training is stopped.

    Raises:
        RunError: when the place cannot be written, and when the disk fills up inside the block.
    """
    folder = output.absolute().with_name(f".{output.name}.training")

    def kept() -> str:
        last = max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*[0-9]")), default=0)
        return f"the training is kept up to step {last} in {folder}" if last else "nothing was trained yet"

    make_writable(folder, _REMEDY)
    with keeping(folder, kept, lambda text: reporter.note(text, passing=True), _REMEDY):
        try:
            yield folder
        finally:
            if not (folder / _BEGUN).exists():
                shutil.rmtree(folder, ignore_errors=True)


def same_settings(folder: Path, settings: Mapping[str, Any], restart: bool, reporter: Reporter) -> None:
    """Refuse to go on with a training that was begun with other settings.

    Args:
        folder: of the training, held.
        settings: all that it depends on.
        restart: throw away what was begun.
        reporter: told when what was begun is damaged, so that it begins anew.

    Raises:
        RunError: naming the settings that differ.
    """
    if restart:
        _clear(folder)
    if not (folder / _BEGUN).exists():
        # Checkpoints that nobody knows the settings of are of no use.
        _clear(folder)
        return
    begun = Folder(folder / _BEGUN, _LABEL, reporter)
    damage = begun.damage()
    if damage is not None:
        reporter.note(f"{_LABEL} was damaged ({damage}): it begins anew", passing=True)
        _clear(folder)
        return
    before = begun.read_json(SETTINGS_FILE)
    differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    if differing:
        raise RunError(
            f"A training for this output was begun with other settings: {', '.join(differing)}.",
            where=str(folder),
            remedy=f"use the same settings to go on, add --restart to begin anew, or {_REMEDY}",
        )


def begin_training(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a training depends on, for those who go on with it."""
    if not (folder / _BEGUN).exists():
        with replacing(folder / _BEGUN) as fresh:
            begun = Folder(fresh, _LABEL, Reporter(show=False))
            begun.write_json(SETTINGS_FILE, settings)
            begun.finish()


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
