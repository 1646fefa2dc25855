"""The tokenizer of a compressed directory, loaded where rankwise is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankwise import compress
from rankwise.recipes import recipe_from


@pytest.fixture
def compressed(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    compress(recipe_from(settings(output=str(tmp_path / "out"))), run_directory=tmp_path / "run")
    return tmp_path / "out"


def ran_code() -> list[str]:
    return [name for name in sys.modules if "modeling_rankwise" in name]


def test_told_to_run_no_code_it_asks_nothing_and_runs_none(
    compressed: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(*_words: str) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asks)
    before, plain = ran_code(), AutoTokenizer.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(compressed, trust_remote_code=False)
    assert type(tokenizer) is type(plain)
    assert tokenizer("a list")["input_ids"] == plain("a list")["input_ids"]
    assert ran_code() == before
    card = (compressed / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("DIR", trust_remote_code=False)' in card


def test_told_nothing_and_without_a_terminal_it_runs_none_either(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_terminal(*_words: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", no_terminal)
    before = ran_code()
    assert AutoTokenizer.from_pretrained(compressed)("a list")["input_ids"]
    assert ran_code() == before


def test_a_classifier_is_no_form_of_a_compressed_checkpoint(compressed: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(compressed, trust_remote_code=False)
