"""What a run takes where nothing was said is said before it begins, and is what a laptop can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Run
from rankwise.cli.options import defaults_in_words
from rankwise.recipes import Calibration, recipe_from
from rankwise.reports import Report


@pytest.mark.parametrize(
    ("sequences", "device", "count"),
    [("auto", "cpu", 24), ("auto", "cuda", 256), (7, "cpu", 7), (7, "cuda", 7), (None, "cpu", None)],
)
def test_how_many_sequences_are_read(sequences: object, device: str, count: int | None) -> None:
    assert Calibration(sequences=sequences).counted(device) == count  # type: ignore[arg-type]


def test_defaults_are_said_and_nothing_else() -> None:
    said = defaults_in_words(recipe_from({"model": "m", "device": "cpu"}), sized=False)
    assert [line.split(",")[0] for line in said] == [
        "size: --keep 0.8",
        "calibration: the documentation that Python carries",
        "calibration: 24 sequences",
    ]
    told = {"source": "text:x", "sequences": 8}
    assert defaults_in_words(recipe_from({"model": "m", "device": "cpu", "calibration": told}), sized=True) == []
    in_bits = recipe_from({"model": "m", "device": "cpu", "calibration": told, "budget": {"bits": 4}})
    assert defaults_in_words(in_bits, sized=True, named=False) == [
        "method: quantize, as --bits is given and no --method"
    ]
    assert defaults_in_words(in_bits, sized=True, named=True) == []
    # A size by hand has nothing to be said of.
    by_hand = {"method": "afm", "allocation": "manual:q=0.5", "budget": {"keep": None}, "calibration": told}
    assert defaults_in_words(recipe_from({"model": "m", "device": "cpu", **by_hand}), sized=False) == []


def test_a_run_in_bits_says_that_it_takes_codes(rankwise: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("--run-dir", tmp_path / "run", "--length", "16", "--sequences", "4", "--bits", "12", "--device", "cpu")
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "out", *words)
    assert status == 0, error
    assert error.splitlines()[0] == "method: quantize, as --bits is given and no --method"
    assert Report.load(tmp_path / "out/rankwise_report.json").recipe.method.name == "quantize"


def test_a_run_says_them_first(rankwise: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("--run-dir", tmp_path / "run", "--length", "16", "--method", "svd", "--device", "cpu")
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "out", *words)
    assert status == 0, error
    lines = error.splitlines()
    assert lines[0] == "size: --keep 0.8, as none is given"
    assert lines[2].startswith("calibration: 24 sequences, gradients at 6 of them, as usual on a CPU")
    assert Report.load(tmp_path / "out/rankwise_report.json").calibration.sequences == 24
    assert rankwise("compress", tiny, "-o", tmp_path / "out", *words, "--quiet")[2] == ""
