"""Fixtures: a tiny random Llama with a real tokenizer, the bundled model, and the real models where they are."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rankwise import cli
from rankwise.quickstart import MODEL

Run = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("RANKWISE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"real models are not at {folder}; set RANKWISE_SHARED")
    return folder


@pytest.fixture(scope="session")
def bundled() -> Path:
    return MODEL


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention; weights large enough that its outputs differ."""
    settings: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def failed(result: tuple[int, str, str], *says: str) -> None:
    """Assert that a command ended with an error for people, which says this."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    for each in ("error: ", *says):
        assert each in err


@pytest.fixture(scope="session")
def _tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(_tiny_source: Path, tmp_path: Path) -> Path:
    """A directory with a tiny model, free to be damaged."""
    return Path(shutil.copytree(_tiny_source, tmp_path / "tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = ["list", "object", "return", "the", "string", "value", "of", "a", "function", "class"]
    lines = (" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + "\n" for i in range(400))
    path.write_text("".join(lines))
    return path


@pytest.fixture
def settings(tiny: Path, text: Path) -> Callable[..., dict[str, Any]]:
    """A recipe's mapping for the tiny model, with changes on top."""

    def make(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model": str(tiny),
            "method": "bolaco",
            "budget": {"keep": 0.6, "rank_multiple": 1},
            "calibration": {"source": f"text:{text}", "sequences": 40, "length": 32},
        }
        return {**base, **changes}

    return make


@pytest.fixture
def rankwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit status, standard output, standard error."""

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
