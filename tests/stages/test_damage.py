"""Harmed stage files are said and made again, a disk may fill up anywhere, and notes are the same each time."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rankwise import compress
from rankwise.errors import RunError
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.runs import MANIFEST, Lines, folder
from rankwise.stages import repairing

KINDS = (
    "statistics-input_moments",
    "fits-caldera",
    "score-dense",
    "statistics-curvature",
    "outlooks-two_sided",
    "selection",
    "search",
    "repair-refit",
    "repair-blocks",
    "repair-factors",
    "score-compressed",
)


def changed(content: bytes) -> bytes:
    at = len(content) * 2 // 3
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def edited(content: bytes) -> bytes:
    """Another last digit, in a file of text; another last byte in any other."""
    if not content.startswith((b"{", b"[")):
        return content[:-1] + bytes([content[-1] ^ 1])
    return re.sub(rb"\d(?=\D*$)", lambda found: b"1" if found.group() != b"1" else b"2", content)


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "change": changed,
    "cut": lambda content: content[: len(content) * 3 // 5],
    "delete": lambda content: None,
    "empty": lambda content: b"",
    "edit": edited,
}


@dataclass(frozen=True)
class Whole:
    """Two finished runs: their recipes, their directory, and what came out."""

    recipes: list[dict[str, Any]]
    directory: Path
    outcome: list[Any]
    notes: list[str]


def run(recipes: list[dict[str, Any]], directory: Path) -> tuple[list[Any], list[str]]:
    """Of each recipe the plan and a hash of all tensors; and the notes of all reports."""
    found: list[Any] = []
    notes: list[str] = []
    for values in recipes:
        result = compress(recipe_from(values), run_directory=directory, reporter=Reporter(show=False))
        digest = hashlib.sha256()
        for name, tensor in sorted(result.model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found += [result.plan.model_dump(), digest.hexdigest()]
        notes += result.report.notes
    return found, notes


@pytest.fixture(scope="module")
def whole(_tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every kind of stage: statistics, outlooks, codes; a selection, a search, three repairs, scores."""
    place = tmp_path_factory.mktemp("whole")
    words = ["list", "object", "return", "the", "string", "value", "of", "a", "function", "class"]
    lines = (" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + "\n" for i in range(400))
    (place / "text.txt").write_text("".join(lines))
    source = f"text:{place / 'text.txt'}"
    common = {
        "model": str(_tiny_source),
        "calibration": {"source": source, "sequences": 24, "length": 32},
    }
    coded = {
        **common,
        "method": {"name": "caldera", "q_bits": 4, "rank": 2, "outer": 1, "inner": 1},
        "allocation": "uniform",
    }
    repaired = {
        **common,
        "method": {"name": "two_sided", "curvature_gb": 1e-5},
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "allocation": {"name": "bayesian", "space": "rolesx1", "trials": 4},
        "validation": {"sequences": 6, "length": 32, "select": "top", "count": 3, "plans": 3},
        "evaluation": {"source": source, "sequences": 4, "length": 32},
        "repair": {
            "steps": "refit,blocks,factors",
            "blocks": {"epochs": 1},
            "factors": {"epochs": 1, "batch_size": 8, "lr": 0.01, "loss": "lm", "save_every": 1},
        },
    }
    recipes = [coded, repaired]
    outcome, notes = run(recipes, place / "run")
    return Whole(recipes, place / "run", outcome, notes)


def files_of(directory: Path, kind: str) -> list[Path]:
    (stage,) = [path for path in directory.iterdir() if path.name.startswith(f"{kind}-")]
    return sorted(path.relative_to(directory) for path in stage.rglob("*") if path.is_file())


def harm_and_run_again(whole: Whole, directory: Path, files: list[Path], harm: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(whole.directory, directory)
    for file in files:
        content = HARMS[harm]((directory / file).read_bytes())
        if content is None:
            (directory / file).unlink()
        else:
            (directory / file).write_bytes(content)
    outcome, notes = run(whole.recipes, directory)
    assert outcome == whole.outcome
    for file in files:
        assert any(file.parts[0] in note and ("damaged" in note or "not whole" in note) for note in notes), file
    again = [note for note in notes if "damaged" not in note and "not whole" not in note]
    assert again == whole.notes


@pytest.mark.parametrize("harm", ["change", "delete"])
def test_a_harmed_file_of_every_stage_is_said_and_made_again(harm: str, whole: Whole, tmp_path: Path) -> None:
    files = [next(f for f in files_of(whole.directory, kind) if f.name != MANIFEST) for kind in KINDS]
    harm_and_run_again(whole, tmp_path / "run", files, harm)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_every_file_of_every_stage_may_be_harmed(harm: str, whole: Whole, tmp_path: Path) -> None:
    """An eighth of each stage's files at a time."""
    by_kind = [files_of(whole.directory, kind) for kind in KINDS]
    for turn in range(8):
        harm_and_run_again(whole, tmp_path / "run", [file for files in by_kind for file in files[turn::8]], harm)


def test_a_run_from_finished_stages_makes_the_same_notes(whole: Whole) -> None:
    """Notes that statistics make, and repairs."""
    for words in ("the full curvature does not fit", "repair blocks: undone"):
        assert any(words in note for note in whole.notes), words
    outcome, notes = run(whole.recipes, whole.directory)
    assert outcome == whole.outcome
    assert notes == whole.notes


def test_the_disk_may_fill_up_at_every_stage(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, add, filled = folder.replacing, Lines.add, []

    def full_at(kind: str, path: Path) -> None:
        if kind not in filled and path.parent.name.startswith(f"{kind}-"):
            filled.append(kind)
            raise OSError(errno.ENOSPC, "No space left on device")

    for kind in KINDS:

        @contextmanager
        def replacing(path: Path, kind: str = kind) -> Iterator[Path]:
            with real(path) as fresh:
                yield fresh
                full_at(kind, path)

        def adding(lines: Lines, record: Any, sync: bool, kind: str = kind) -> None:
            if lines.path.name != MANIFEST and len(lines.records) == 2:
                full_at(kind, lines.path)
            add(lines, record, sync=sync)

        monkeypatch.setattr(folder, "replacing", replacing)
        monkeypatch.setattr(Lines, "add", adding)
        with pytest.raises(RunError, match=r"The disk is full: \d+ stages.* are kept in"):
            run(whole.recipes, tmp_path / "run")
    monkeypatch.undo()
    assert filled == list(KINDS)
    assert run(whole.recipes, tmp_path / "run") == (whole.outcome, whole.notes)


@pytest.mark.parametrize(
    ("judged", "file"),
    [
        (2, "repair-refit-*.partial/block-0000.safetensors"),
        (5, "repair-blocks-*.partial/block-0000.json"),
        (7, "repair-factors-*.partial/trainer/checkpoint-3/trained.safetensors"),
        (7, "repair-factors-*.partial/trainer/checkpoint-3/optimizer.pt"),
    ],
)
def test_what_a_stopped_repair_left_may_be_harmed(
    judged: int, file: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refit of two blocks is judged three times, as is their training; the training of the factors twice."""
    for stage in whole.directory.iterdir():
        if stage.is_dir() and not stage.name.startswith(("repair", "score-compressed")):
            shutil.copytree(stage, tmp_path / "run" / stage.name)
    judge, calls = repairing.judge_repair, []

    def stopping(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) > judged:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(repairing, "judge_repair", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(whole.recipes[1:], tmp_path / "run")
    monkeypatch.undo()
    (path,) = (tmp_path / "run").glob(file)
    path.write_bytes(changed(path.read_bytes()))
    outcome, notes = run(whole.recipes[1:], tmp_path / "run")
    assert outcome == whole.outcome[2:]
    (damage,) = [note for note in notes if path.name in note]
    assert [note for note in notes if note != damage] == whole.notes
    assert not list((tmp_path / "run").glob("*.partial"))


STOPPED = """
import os, signal, sys
import yaml
from rankwise import compress
from rankwise.recipes import recipe_from
from rankwise.progress import Reporter
from rankwise.stages import jobs as stages
real, calls = stages.save_outlook, []
def stopping(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), int(sys.argv[1]))
    real(*arguments)
stages.save_outlook = stopping
class Stopped(BaseException):
    pass
def stop(*_):
    raise Stopped
signal.signal(signal.SIGTERM, stop)
try:
    compress(recipe_from(yaml.safe_load(open(sys.argv[2]))), run_directory=sys.argv[3], reporter=Reporter())
except (Stopped, KeyboardInterrupt):
    sys.exit(7)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_says_what_is_kept(sent: int, whole: Whole, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole.recipes[1]))
    words = [str(int(sent)), str(tmp_path / "recipe.yaml"), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", STOPPED, *words], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"note: stopped: \d stages are kept in .*; the same command goes on from there", done.stderr)
    assert len(list((tmp_path / "run").glob("outlooks-*/*.safetensors"))) == 3
    assert not list((tmp_path / "run").rglob(".*.new"))
