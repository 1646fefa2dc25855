"""Jobs in this process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError
from rankwise.runs import Here, Job, Run, clear_scratch


def double(held: list[int], out: Path, *, number: int) -> int:
    held.append(number)
    (out / "part").mkdir()
    (out / "part" / "file").write_text(str(2 * number))
    return 2 * number


def fails(_held: Any, out: Path) -> None:
    (out / "file").write_text("half")
    raise RankwiseError("No.")


def test_results_come_in_order_with_their_files_and_nothing_is_left(tmp_path: Path) -> None:
    held: list[int] = []
    with Here(held, tmp_path) as crew:
        jobs = (Job("test_executor:double", {"number": number}) for number in range(3))
        for number, done in enumerate(crew.results(jobs)):
            # A job is taken no sooner than the result before it was given.
            assert held == list(range(number + 1))
            assert done.value == 2 * number
            done.put("part/file", tmp_path / f"{number}.txt")
    assert [(tmp_path / f"{number}.txt").read_text() for number in range(3)] == ["0", "2", "4"]
    with pytest.raises(RankwiseError, match="No"):
        list(Here(held, tmp_path).results([Job("test_executor:fails")]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.txt", "1.txt", "2.txt"]


def waits(held: dict[str, Any], out: Path, *, number: int) -> int:
    """Ends only when its neighbour has begun, so that two are at work at once."""
    held["met"].wait(timeout=30)
    with held["lock"]:
        held["most"] = max(held["most"], len(list(out.parent.iterdir())))
    (out / "file").write_text(str(number))
    return number


def test_jobs_side_by_side_give_their_results_in_order(tmp_path: Path) -> None:
    held = {"met": threading.Barrier(2), "lock": threading.Lock(), "most": 0}
    with Here(held, tmp_path, at_once=2) as crew:
        assert crew.workers == 2
        jobs = (Job("test_executor:waits", {"number": number}) for number in range(6))
        found = [(done.value, Path(done.files["file"]).read_text()) for done in crew.results(jobs)]
    assert found == [(number, str(number)) for number in range(6)]
    assert held["most"] == 2
    assert not list(tmp_path.iterdir())


def test_an_error_side_by_side_ends_the_others_and_leaves_nothing(tmp_path: Path) -> None:
    held: list[int] = []
    jobs = iter([Job("test_executor:fails"), *(Job("test_executor:double", {"number": each}) for each in range(9))])
    with pytest.raises(RankwiseError, match="No"):
        list(Here(held, tmp_path, at_once=2).results(jobs))
    assert len(held) <= 1
    assert len(list(jobs)) == 8
    assert not list(tmp_path.iterdir())


def test_what_killed_jobs_left_is_no_stage_and_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".work-abc").mkdir()
    (tmp_path / ".work-abc" / "file").write_text("half")
    (tmp_path / ".seen-1").touch()
    (tmp_path / "stage-1").mkdir()
    run = Run(tmp_path)
    assert run.kept().startswith("1 stages are kept")
    clear_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-1"]
