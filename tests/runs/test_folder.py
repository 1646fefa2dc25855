"""Folders are taken over as they were written, whatever is done to their files."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import RunError
from rankwise.progress import Reporter
from rankwise.runs import MANIFEST, Folder, Lines, Run, make_writable, take_space, write_atomically
from rankwise.runs.folder import workspace

KEY = {"weights": "w"}


def filled(run: Run, reporter: Reporter | None = None) -> Any:
    """A finished stage of two files and a note."""
    stage = run.stage("statistics", KEY, reporter)
    if not stage.taken_over():
        with stage.making() as folder:
            stage.reporter.note("one layer is idle")
            folder.write_json("inside/a.json", {"value": 1.5})
            with folder.writing("b.bin") as path:
                path.write_bytes(bytes(range(200)))
    return stage


def contents(stage: Any) -> dict[str, bytes]:
    return {name: (stage.folder / name).read_bytes() for name in ("inside/a.json", "b.bin")}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    filled(Run(folder))
    return folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stage_is_taken_over_as_it_was_written_or_made_again(
    data: st.DataObject, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever byte is changed, whatever is cut off, added or deleted."""
    folder = tmp_path_factory.mktemp("harmed")
    shutil.copytree(written, folder, dirs_exist_ok=True)
    before = filled(Run(written))
    stage = Run(folder).stage("statistics", KEY)
    file = stage.folder / data.draw(st.sampled_from(["inside/a.json", "b.bin", MANIFEST]))
    content = bytearray(file.read_bytes())
    harm = data.draw(st.sampled_from(["change", "cut", "delete", "add"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if harm == "change":
        content[at] ^= data.draw(st.integers(1, 255))
    elif harm == "cut":
        del content[at:]
    elif harm == "add":
        content += b"x"
    file.write_bytes(content)
    if harm == "delete":
        file.unlink()
    reporter = Reporter(show=False)
    after = filled(Run(folder), reporter)
    assert contents(after) == contents(before)
    damages = [note for note in reporter.notes if "was damaged" in note]
    assert len(damages) == 1
    assert after.label in damages[0]
    assert [note for note in reporter.notes if note not in damages] == ["one layer is idle"]
    again = Reporter(show=False)
    filled(Run(folder), again)
    assert again.notes == ["one layer is idle"]


def test_notes_are_kept_with_a_stage_through_a_kill(tmp_path: Path) -> None:
    def make(stop: bool) -> list[str]:
        reporter = Reporter(show=False)
        reporter.note("said before")
        stage = Run(tmp_path).stage("x", KEY, reporter)
        if not stage.taken_over():
            with stage.making() as folder:
                reporter.note("said before")
                reporter.note("waiting", passing=True)
                if not folder.has("first.json"):
                    reporter.note("of the first part")
                    folder.write_json("first.json", 1)
                if stop:
                    raise KeyboardInterrupt
                reporter.note("of the second part")
        return reporter.notes

    with pytest.raises(KeyboardInterrupt):
        make(stop=True)
    assert make(stop=False) == ["said before", "of the first part", "waiting", "of the second part"]
    assert make(stop=False) == ["said before", "of the first part", "of the second part"]
    silent = Reporter(show=False)
    assert Run(tmp_path).stage("x", KEY, silent).taken_over()
    assert silent.notes == ["said before", "of the first part", "of the second part"]


@pytest.mark.parametrize("harm", ["change", "cut", "empty", "delete", "list"])
def test_a_growing_folder_says_what_is_damaged_and_keeps_the_rest(harm: str, tmp_path: Path) -> None:
    folder = workspace(tmp_path, "outlooks-1", Reporter(show=False))
    for name in "abc":
        folder.write_json(name, name)
    file = tmp_path / ("b" if harm != "list" else MANIFEST)
    content = file.read_bytes()
    if harm == "delete":
        file.unlink()
    elif harm == "list":
        first, a, *rest = content.splitlines(keepends=True)
        file.write_bytes(first + a + b"".join(rest).replace(b'"b"', b'"B"'))
    else:
        file.write_bytes({"change": b'"B"', "cut": content[:-1], "empty": b""}[harm])
    reporter = Reporter(show=False)
    again = workspace(tmp_path, "outlooks-1", reporter)
    assert [again.has(name) for name in "abc"] == [True, False, harm != "list"]
    assert len(reporter.notes) == 1
    assert "outlooks-1 was damaged" in reporter.notes[0]
    for name in "bc":
        again.write_json(name, name)
    silent = Reporter(show=False)
    last = workspace(tmp_path, "outlooks-1", silent)
    assert [last.has(name) for name in "abc"] == [True] * 3
    assert silent.notes == []


def test_the_folder_of_another_stage_is_not_taken_for_this_one(tmp_path: Path) -> None:
    one, run = filled(Run(tmp_path)), Run(tmp_path)
    reporter = Reporter(show=False)
    other = run.stage("statistics", {"weights": "other"}, reporter)
    shutil.copytree(one.folder, other.folder)
    assert not other.taken_over()
    assert f"is of {one.label}" in reporter.notes[0]
    assert not other.folder.exists()
    other.folder.write_text("a file")
    assert not other.taken_over()
    with other.making() as folder:
        folder.write_json("a", 1)
    assert other.taken_over()


def test_files_get_the_mode_that_the_mask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        stage = filled(Run(tmp_path / "run"))
        with stage.workspace().writing("private") as path:
            path.touch(mode=0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_lines_go_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = Lines(path)
    lines.add({"a": 1}, sync=True)
    lines.add({"b": 0.1}, sync=False)
    path.write_bytes(path.read_bytes()[:-5])
    torn = Lines(path)
    assert (torn.records, torn.torn) == ([{"a": 1}], True)
    torn.add({"c": None}, sync=False)
    assert (Lines(path).records, Lines(path).fault) == ([{"a": 1}, {"c": None}], None)


def test_two_writers_of_one_small_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is writing."""
    file, real = tmp_path / "settings.json", Path.write_text

    def slow(path: Path, text: str) -> int:
        monkeypatch.setattr(Path, "write_text", real)
        real(path, "half of ")
        write_atomically(file, "second")
        assert file.read_text() == "second"
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", slow)
    write_atomically(file, "first")
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["settings.json"]


def test_what_cannot_be_written_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "file" / "run")

    def refused(**_options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(RunError, match="Read-only file system"):
        make_writable(tmp_path, "give another")


def test_the_space_of_a_mapped_file_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.models import allocate

    tensor = allocate((3, 1000), tmp_path, "hidden", 0)
    tensor.fill_(1.0)
    assert (tmp_path / "hidden").stat().st_blocks * 512 >= 12_000
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(RunError, match=r"disk is full: 1.2e-05 GB"):
        allocate((3, 1000), tmp_path, "hidden", 0)
    assert not (tmp_path / "hidden").exists()
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    take_space(tmp_path / "other", 5000)
    assert (tmp_path / "other").stat().st_size == 5000


def test_a_folder_that_is_not_finished_is_not_taken_over(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x", "x", Reporter(show=False))
    folder.write_json("a", 1)
    assert folder.damage() == f"{MANIFEST} has no end"


def test_what_is_in_the_way_of_a_stage_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = run.stage("x", KEY)
    stage.partial.write_text("a file")
    with stage.making() as folder:
        folder.write_json("a", 1)
    assert stage.taken_over()
    growing = run.stage("outlooks", KEY)
    (growing.folder / MANIFEST).mkdir(parents=True)
    growing.workspace().write_json("a", 1)
    assert growing.workspace().has("a")


def test_a_file_that_cannot_be_written_is_an_error_for_people(tmp_path: Path) -> None:
    run = Run(tmp_path)
    refused = pytest.raises(RunError, match="cannot be read or written")
    with refused, run.locked():
        stage = run.stage("x", KEY)
        with stage.making() as folder:
            (folder.path / "a").mkdir()
            folder.write_json("a", 1)
    with pytest.raises(FileNotFoundError), run.locked():
        (tmp_path.parent / "elsewhere").read_bytes()
