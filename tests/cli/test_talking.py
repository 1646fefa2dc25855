"""Talking to a model on the command line: its template, answers as they grow, and models that have none."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import Run, failed
from rankwise.checkpoints import load_model
from rankwise.evaluation import answer, chat_ids, generate

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def talker(tiny: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny)
    return tiny


def test_pieces_are_the_answer_to_all_that_was_said(talker: Path) -> None:
    loaded, pieces = load_model(str(talker)), []
    turns = [{"role": "user", "content": "a list"}]
    found = answer(loaded.model, loaded.tokenizer, turns, pieces.append, new_tokens=6)
    assert "".join(pieces) == found
    assert found == generate(loaded.model, loaded.tokenizer, "a list", new_tokens=6, template=True)
    ids = chat_ids(loaded.tokenizer, [*turns, {"role": "assistant", "content": found}, *turns])["input_ids"]
    assert loaded.tokenizer.decode(ids[0], skip_special_tokens=True).count("user: a list") == 2


def test_half_a_character_waits_for_the_rest(talker: Path) -> None:
    from rankwise.evaluation.chat import _Pieces

    loaded, said = load_model(str(talker)), []
    tokenizer = loaded.tokenizer
    pieces = _Pieces(tokenizer, said.append)
    import torch

    text = "x\N{GREEK SMALL LETTER ALPHA}\N{GRINNING FACE}y"
    pieces.put(torch.tensor([[1, 2]]))
    for each in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.put(torch.tensor([each]))
    pieces.end()
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(said)
    assert "".join(said) == pieces.text == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_chat_reads_lines_and_answers_each(talker: Path, rankwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a list\n/new\na string\n\nnever said\n"))
    status, out, err = rankwise("chat", talker, "--against", talker, "--new-tokens", 3)
    assert (status, err) == (0, "")
    assert out.count(f"[{talker}]") == 4


def test_a_model_without_a_template_is_not_talked_to(tiny: Path, rankwise: Run) -> None:
    failed(rankwise("chat", tiny), "no chat template", "rankwise generate")


def test_generate_uses_the_template_unless_told(talker: Path, rankwise: Run) -> None:
    words: Any = ("generate", talker, "--prompt", "Return a", "--new-tokens", 3)
    answered, continued = rankwise(*words)[1], rankwise(*words, "--no-template")[1]
    assert continued.startswith("Return a")
    assert not answered.startswith("Return a")
