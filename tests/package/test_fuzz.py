"""Every reader takes what it is given or refuses it in words. `make fuzz` tries many more of the same inputs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing.__main__ import main, outcome
from fuzzing.kinds import Kind, all_kinds
from rankwise.errors import RankwiseError

_NAMES = [
    *("recipes (YAML)", "options (--set and others)", "options (finetune)", "plan.json", "rankwise_report.json"),
    *("config.json, checked", "config.json, model loaded", "safetensors headers", "model.safetensors.index.json"),
    *("names of sources", "text", "jsonl", "alpaca", "tokens", "parquet"),
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {kind.name: kind for kind in all_kinds(tmp_path_factory.mktemp("fuzz"))}


def test_every_kind_is_tried(kinds: dict[str, Kind]) -> None:
    assert list(kinds) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_readers_take_it_or_refuse_it_in_words(name: str, kinds: dict[str, Kind]) -> None:
    kind = kinds[name]

    @settings(max_examples=3 * kind.share, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(use_true_random=False))
    def tried(random: Random) -> None:
        problem = outcome(kind, kind.make(random))
        if problem is not None and not isinstance(problem, RankwiseError):
            raise AssertionError("a foreign exception") from problem

    tried()


def test_what_is_valid_is_taken_and_what_is_not_is_refused(kinds: dict[str, Kind]) -> None:
    for name in ("recipes (YAML)", "plan.json", "rankwise_report.json", "jsonl"):
        kind, random = kinds[name], Random(1)
        found = [outcome(kind, kind.make(random)) for _ in range(60)]
        assert any(each is None for each in found), name
        assert any(isinstance(each, RankwiseError) for each in found), name


def test_a_foreign_exception_is_counted_and_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def breaks(number: int) -> None:
        if number % 2:
            raise KeyError("nobody foresaw this")

    made = iter(range(100))
    kind = Kind("odd numbers", lambda random: next(made), breaks)
    monkeypatch.setattr("fuzzing.__main__.all_kinds", lambda folder: [kind])
    assert main(["--inputs", "10"]) == 1
    shown = capsys.readouterr().out
    assert "10 inputs" in shown
    assert "5 foreign exceptions" in shown
    assert "nobody foresaw this" in shown
