"""What runs leave is listed and deleted by name or by age; where a run works nothing is touched."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, failed
from rankwise import compress
from rankwise.recipes import recipe_from
from rankwise.runs import cache_root


@pytest.fixture
def kept(settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache with the stages of a run, those of an older one, and a folder that is no run's."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    compress(recipe_from(settings(method="svd")))
    old = cache_root() / "old"
    (old / "statistics-0").mkdir(parents=True)
    (old / ".lock").touch()
    (old / "statistics-0" / "data").write_bytes(b"x" * 5_000_000)
    long_ago = time.time() - 40 * 86_400
    for path in (old / "statistics-0" / "data", old / ".lock", old / "statistics-0", old):
        os.utime(path, (long_ago, long_ago))
    (cache_root() / "notes").mkdir()
    (cache_root() / "notes" / "mine.txt").write_text("not a run's")
    return cache_root()


def test_what_is_kept_is_listed_largest_first(rankwise: Run, kept: Path) -> None:
    status, out, _ = rankwise("cache", "ls")
    assert status == 0
    assert out.index("old") < out.index("tiny")
    assert "40 days ago" in out
    assert "0 hours ago" in out
    assert "notes" not in out
    assert str(kept) in out
    listed = json.loads(rankwise("cache", "ls", "--json")[1])
    assert [each["name"] for each in listed] == ["old", "tiny"]
    assert listed[0]["bytes"] == pytest.approx(5e6, rel=0.01)
    assert listed[1]["stages"] >= 1


def test_a_name_is_deleted_and_a_wrong_one_is_told_the_nearest(rankwise: Run, kept: Path) -> None:
    failed(rankwise("cache", "rm", "tini"), "tiny")
    status, out, _ = rankwise("cache", "rm", "old", "old")
    assert status == 0
    assert "5.00 MB freed" in out
    assert not (kept / "old").exists()
    assert (kept / "tiny").exists()
    failed(rankwise("cache", "rm", "../cache/tiny"), "Nothing is kept of")
    failed(rankwise("cache", "rm", "notes"), "Nothing is kept of")
    assert (kept / "notes" / "mine.txt").exists()


def test_what_is_old_is_pruned(rankwise: Run, kept: Path) -> None:
    assert json.loads(rankwise("cache", "prune", "--older-than", "8w", "--json")[1])["deleted"] == []
    assert json.loads(rankwise("cache", "prune", "--json")[1])["deleted"] == ["old"]
    assert (kept / "tiny").exists()
    failed(rankwise("cache", "prune", "--older-than", "a while"), "12h, 30d or 8w")


def test_where_a_run_works_nothing_is_deleted(rankwise: Run, kept: Path) -> None:
    with (kept / "tiny" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, out, err = rankwise("cache", "rm", "tiny", "old")
    assert status == 0
    assert "tiny is left: a run works there" in err
    assert "old" in out
    assert (kept / "tiny").exists()
    assert not (kept / "old").exists()


def test_an_empty_cache_says_where_it_would_be(rankwise: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "none"))
    assert f"nothing is kept in {tmp_path / 'none'}" in rankwise("cache", "ls")[1]
    failed(rankwise("cache", "rm", "a"), "nothing is kept there")
