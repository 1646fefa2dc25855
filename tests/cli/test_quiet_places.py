"""Without a terminal a run says what it is at; what an earlier run finished is marked, and not timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Run
from rankwise import progress
from rankwise.checkpoints import REPORT_FILE
from rankwise.progress import Reporter
from rankwise.reports import Report


def test_a_line_a_stage_and_what_is_taken_over_is_marked(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    words = ["--calibration", f"text:{text}", "--sequences", 8, "--length", 32, "--evaluation", f"text:{text}"]
    command = ("compress", tiny, "-o", tmp_path / "out", "--method", "svd", *words)
    first, second = rankwise(*command), rankwise(*command)
    report = Report.load(tmp_path / "out" / REPORT_FILE)
    for _, out, err in (first, second):
        lines = err.splitlines()
        assert [f"{name} ..." for name in report.stages] == [each for each in lines if each.endswith(" ...")][:-1]
        assert lines[-1] == "checkpoint ..."
        assert "..." not in out
    assert "taken over" not in first[1]
    assert report.stages["evaluate dense"].taken_over
    assert not report.stages["load"].taken_over
    (row,) = [line for line in second[1].splitlines() if line.startswith("evaluate dense")]
    assert "taken over" in row
    assert " s " not in row


def test_long_work_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    for reporter, says in (
        (Reporter(lines=True), True),
        (Reporter(), False),
        (Reporter(show=False, lines=True), False),
    ):
        assert list(reporter.track([7, 8], "work", total=3, done=1)) == [7, 8]
        assert ("work: 2 of 3" in capsys.readouterr().err) == says


def test_what_workers_do_is_said_between_two_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    reporter = Reporter(lines=True)
    reporter.beside("worker 1: idle")
    assert capsys.readouterr().err == ""
    with reporter.counting("work", total=2) as advance:
        reporter.beside("worker 1: block 3")
        assert capsys.readouterr().err == "work: 0 of 2 (worker 1: block 3)\n"
        advance("work")
        advance("work")
