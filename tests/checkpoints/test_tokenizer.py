"""The tokenizer of a compressed directory, loaded where rankwise is not installed."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import ROOT
from rankwise import compress
from rankwise.checkpoints import load_model
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


@pytest.mark.parametrize("page", ["README.md", "the card"])
def test_the_snippet_as_printed_asks_nothing_and_warns_of_nothing(page: str, compressed: Path, tmp_path: Path) -> None:
    """On a terminal, where a question would be asked, and in a process that cannot import rankwise."""
    text = (ROOT / page if page == "README.md" else compressed / "README.md").read_text()
    (snippet,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AutoTokenizer" in each]
    named = '"DIR"' if page == "README.md" else f'"{compressed.name}"'
    assert snippet.count(named) == 2
    script = tmp_path / "snippet.py"
    absent = 'import sys\nsys.modules["rankwise"] = None\n'
    script.write_text(absent + snippet.replace(named, repr(str(compressed))) + 'print(tokenizer("a list"), "loaded")\n')
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    child = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    # A question would wait for an answer for ever: it is answered by no.
    while chunk := _read(ours):
        shown += chunk
        if b"[y/N]" in shown:
            child.kill()
            break
    status = child.wait(timeout=60)
    os.close(ours)
    printed = shown.decode()
    assert "[y/N]" not in printed
    assert "model of type" not in printed
    assert "rror" not in printed, printed
    assert status == 0, printed
    assert "loaded" in printed


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_our_own_loading_warns_of_nothing(compressed: Path, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_model(str(compressed)).tokenizer
    assert "model of type" not in caplog.text
    plain = AutoTokenizer.from_pretrained(tiny)
    assert type(tokenizer) is type(plain)
    assert tokenizer("a list")["input_ids"] == plain("a list")["input_ids"]


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
