"""What tables, pictures and commands say is what was done: sizes of what was written, tokens, widths, axes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import ROOT, Run
from rankwise import compress
from rankwise.recipes import recipe_from
from rankwise.reports import Report, draw_plan, draw_trials, plan_tables
from rankwise.sizes import Plan

PLANS = sorted((ROOT / "tests/fixtures/written-by-0.1.0").rglob("plan.json"))
Settings = Callable[..., dict[str, Any]]


def test_the_dense_format_says_the_size_of_what_it_wrote(settings: Settings, tmp_path: Path) -> None:
    report = compress(recipe_from(settings(output=str(tmp_path / "out"), format="dense"))).report
    assert report.after.linear_parameters == report.before.linear_parameters
    assert report.bytes_on_disk is not None
    assert report.bytes_on_disk == pytest.approx(report.after.bytes, rel=0.05)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_fits_the_terminal_line_by_line(path: Path, width: int) -> None:
    tables = plan_tables(Plan.load(path), Console(width=width))
    assert sum(len(table.columns) - 1 for table in tables) >= 7
    for table in tables:
        assert Console(width=1000).measure(table).maximum <= width


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_a_picture_of_a_plan_says_its_size_once(path: Path, tmp_path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        draw_plan(tmp_path / "plan.svg", Plan.load(path))
    text = (tmp_path / "plan.svg").read_text()
    assert "bits a weight on the average" in text or "of the whole kept" in text
    assert not re.search(r"bits a weight: [\d.]+ of the whole", text)


def test_axes_of_trials_have_whole_trials_and_plain_numbers(tmp_path: Path) -> None:
    from matplotlib import rc_context

    trials = [{"trial": n, "objective": 50 - n, "failed": False, "origin": "spread"} for n in range(4)]
    with rc_context({"svg.fonttype": "none"}):
        draw_trials(tmp_path / "trials.svg", trials)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "trials.svg").read_text())
    numbers = [float(each) for each in labels if re.fullmatch(r"[\d.]+", each)]
    assert {1, 2, 3, 4} <= set(numbers)
    assert len([each for each in numbers if each >= 47]) >= 2
    assert not any("10^" in each or "times" in each for each in labels)


def test_a_training_says_what_it_was_on_and_when_it_was_undone(
    settings: Settings, text: Path, rankwise: Run, tmp_path: Path
) -> None:
    compress(recipe_from(settings(output=str(tmp_path / "out"), method="two_sided")))
    words = ("--data", f"text:{text}", "--length", 32, "--held-out", 5, "-o", tmp_path / "tuned", "--loss", "lm")
    status, out, _ = rankwise("finetune", tmp_path / "out", *words, "--epochs", 2, "--lr", 5)
    assert status == 0
    (step,) = Report.load(tmp_path / "tuned" / "rankwise_report.json").finetune
    assert step.examples.trained_tokens == 2 * step.examples.tokens
    assert f"{step.examples.trained_tokens:,} tokens, 2 passes over {step.examples.tokens:,}" in out
    assert "of the text itself" in out
    assert ("was undone" in out) == (not step.accepted)
