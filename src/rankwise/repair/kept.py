"""Checkpoints of a training that is under way, each listed with the hashes of its files once it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from rankwise.progress import Reporter
from rankwise.runs import MANIFEST, Folder


def seal_checkpoint(checkpoint: Path) -> None:
    """List the files of a checkpoint of a training, which is whole, with their hashes."""
    folder = Folder(checkpoint, checkpoint.name, Reporter(show=False))
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and file.name != MANIFEST:
            folder.add(file.name)
    folder.finish()


def last_checkpoint(folder: Path, reporter: Reporter) -> Path | None:
    """The newest checkpoint of a training that is as it was written, or None; those after it are deleted."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        damage = Folder(path, path.name, reporter).damage()
        if damage is None:
            return path
        reporter.note(f"{path.name} of the training is not whole ({damage}): it goes on from before", passing=True)
        shutil.rmtree(path)
    return None


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
