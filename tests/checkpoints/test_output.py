"""The directory that a run writes: refused before anything is computed, or there whole."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, failed
from rankwise import compress
from rankwise.checkpoints import FILES_FILE, REPORT_FILE, check_output, reserved, writing
from rankwise.errors import OutputError
from rankwise.recipes import recipe_from

Settings = Callable[..., dict[str, Any]]


def fill(output: Path, text: str = "one", files: int = 1) -> None:
    with writing(output) as folder:
        (folder / REPORT_FILE).write_text(text)
        for each in range(files):
            (folder / f"{each}.txt").write_text(text)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("where", ["model", "above the model", "above the stages"])
def test_what_a_run_needs_is_never_replaced(settings: Settings, tmp_path: Path, tiny: Path, where: str) -> None:
    stages = tmp_path / "kept" / "stages"
    output = {"model": tiny, "above the model": tmp_path, "above the stages": stages.parent}[where]
    output.mkdir(exist_ok=True)
    # Without this file the directory would be refused for another reason.
    (output / REPORT_FILE).write_text("{}")
    before = names(output)
    with pytest.raises(OutputError, match="would replace"):
        compress(recipe_from(settings(output=str(output))), run_directory=stages)
    assert names(output) == before
    assert not stages.exists()


@pytest.mark.parametrize("change", ["added", "edited", "folder"])
def test_files_of_the_user_in_a_directory_of_ours_are_kept(tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    fill(output)
    check_output(output, {})
    if change == "folder":
        (output / "notes").mkdir()
    else:
        (output / ("notes.txt" if change == "added" else "0.txt")).write_text("my own words")
    with pytest.raises(OutputError, match=r"holds '(notes|notes\.txt|0\.txt)', which rankwise did not write so"):
        check_output(output, {})


def test_the_result_of_another_model_is_replaced_only_when_told(
    rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    def run(command: str, model: Path, output: str, *more: Any) -> tuple[int, str, str]:
        words = ["--length", 32, "--quiet", "--output", tmp_path / output, *more]
        if command != "finetune":
            words += ["--calibration", f"text:{text}", "--sequences", 8]
        return rankwise(command, model, *words)

    def whose(output: str, file: str = REPORT_FILE) -> str:
        return str(json.loads((tmp_path / output / file).read_text())["recipe"]["model"])

    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    assert run("compress", tiny, "out")[0] == 0
    # The same model again, by another way to it.
    (tmp_path / "way").symlink_to(tiny)
    assert run("compress", tmp_path / "way", "out", "--keep", 0.6)[0] == 0
    refused = run("compress", other, "out")
    failed(refused, f"a result of another model, {tmp_path}/way;", "--overwrite")
    assert whose("out") == str(tmp_path / "way")
    assert not any("other" in path.name for path in Path(os.environ["RANKWISE_CACHE"]).iterdir())
    assert run("compress", other, "out", "--overwrite")[0] == 0
    assert whose("out") == str(other)

    assert run("compress", tiny, "small")[0] == 0
    tuning = ("--data", f"text:{text}", "--epochs", 0.1, "--held-out", 16)
    failed(run("finetune", tmp_path / "small", "out", *tuning), "a result of another model", "--overwrite")
    assert run("finetune", tmp_path / "small", "out", *tuning, "--overwrite")[0] == 0
    assert whose("out") == str(tiny)

    measuring = ("--fractions", "0.5", "--validation", f"text:{text}", "--method", "svd")
    assert run("sensitivity", tiny, "seen", *measuring)[0] == 0
    failed(run("sensitivity", other, "seen", *measuring), "a result of another model", "--overwrite")
    assert run("sensitivity", other, "seen", *measuring, "--overwrite")[0] == 0
    assert whose("seen", "sensitivity.json") == str(other)


def test_a_result_of_nobody_knows_what_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "out", "no JSON")
    check_output(tmp_path / "out", {})
    with pytest.raises(OutputError, match="whose report names no model"):
        check_output(tmp_path / "out", {}, "a model")


def test_a_link_is_kept_and_its_target_filled(tmp_path: Path) -> None:
    real, link = tmp_path / "big disk" / "model", tmp_path / "out"
    link.symlink_to(real)
    for text in ("one", "two"):
        check_output(link, {})
        with reserved(link):
            fill(link, text)
        assert link.is_symlink()
        assert (real / REPORT_FILE).read_text() == text
    assert names(tmp_path) == {"big disk", "out"}
    assert names(real.parent) == {"model"}


@pytest.mark.parametrize("output", ["n" * 300, "file/below", "zero\0byte", "loop"])
def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="cannot be written there"):
        check_output(tmp_path / output, {})
    assert names(tmp_path) == {"file", "loop"}


def test_a_place_that_cannot_be_renamed_into_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OutputError, match="Permission denied"):
        check_output(tmp_path / "out", {})
    assert names(tmp_path) == set()
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match="mount point"):
        check_output(tmp_path / "out", {})


def test_one_writer_an_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with reserved(output):
        with pytest.raises(OutputError, match="Another run is writing this output"), reserved(output):
            pass
        with reserved(tmp_path / "out.other"), reserved(tmp_path / ("n" * 200)), reserved(tmp_path / ("n" * 201)):
            pass
        fill(output)
    with reserved(output):
        fill(output, "two")
    assert names(tmp_path) == {"out"}
    assert names(output) == {REPORT_FILE, FILES_FILE, "0.txt"}


def test_a_run_waits_for_no_output_and_computes_nothing(settings: Settings, tmp_path: Path) -> None:
    output, stages = tmp_path / "out", tmp_path / "stages"
    with reserved(output), pytest.raises(OutputError, match="Another run"):
        compress(recipe_from(settings(output=str(output))), run_directory=stages)
    assert not any(entry.is_dir() for entry in stages.iterdir())


def test_writers_at_one_time_leave_one_whole_result(tmp_path: Path) -> None:
    output, outcomes = tmp_path / "out", []

    def write(text: str, start: threading.Barrier) -> None:
        start.wait()
        try:
            with reserved(output):
                fill(output, text, files=20)
            outcomes.append("written")
        except OutputError:
            outcomes.append("refused")

    for _ in range(10):
        start = threading.Barrier(3)
        threads = [threading.Thread(target=write, args=(text, start)) for text in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        texts = {file.read_text() for file in output.iterdir() if file.name != FILES_FILE}
        assert len(texts) == 1
        assert names(tmp_path) == {"out"}
    assert "written" in outcomes
    assert len(outcomes) == 30


def test_what_a_killed_run_left_is_put_right(tmp_path: Path) -> None:
    output = tmp_path / "o[u]t"
    left, others = tmp_path / ".o[u]t.partial-ab_12xyz", tmp_path / ".o[u]t.partial-ab.partial-ab_12xyz"
    for folder in (left, others):
        folder.mkdir()
    fill(output, "whole")
    os.rename(output, tmp_path / ".o[u]t.old")  # killed between the two renames
    with reserved(output):
        assert (output / REPORT_FILE).read_text() == "whole"
    assert names(tmp_path) == {"o[u]t", others.name}


def test_directories_and_files_have_the_usual_modes(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    fill(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "out")

    def stopped() -> None:
        with writing(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {REPORT_FILE, FILES_FILE, "0.txt"}
