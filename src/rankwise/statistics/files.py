"""The totals of one stream as a file."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankwise.statistics.base import T, Totals
from rankwise.statistics.symmetric import halved, whole


def save_totals(path: Path, totals: Totals) -> None:
    """Write the totals of one stream as safetensors, of symmetric matrices one half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(halved(totals.tensors()), path)


def load_totals(path: Path, kind: type[T]) -> T:
    """Read what `save_totals` wrote of totals of this kind."""
    return kind.of_tensors(whole(load_file(path)))


def load_vectors(path: Path, kind: type[Totals]) -> int:
    """How many vectors were added to totals of this kind, which knows; the rest of the file is not read."""
    with safe_open(path, framework="pt") as file:
        return int(file.get_tensor(kind.vectors_in))
