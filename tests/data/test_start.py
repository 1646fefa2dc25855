"""Start tokens: as the tokenizer does, counted in the length, and never part of a text that is cut anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from conftest import Run, failed, tiny_llama
from rankwise import compress
from rankwise.data import adds_start, load_examples, load_sequences, parse_source, start_token
from rankwise.errors import DataError
from rankwise.evaluation import perplexity
from rankwise.evaluation.perplexity import scored_windows
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from


@pytest.fixture
def plain() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def adding() -> Any:
    """The bundled tokenizer, made to put its start token before a text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def read(text: Path, tokenizer: Any, **settings: Any) -> Any:
    given = {"length": 16, "count": 6, "seed": None, **settings}
    return load_sequences(parse_source(f"text:{text}"), tokenizer, 2048, **given)


def test_auto_does_what_the_tokenizer_does(plain: Any, adding: Any, text: Path) -> None:
    assert (adds_start(plain), adds_start(adding)) == (False, True)
    without = read(text, plain, start="never")
    assert without.bos is None
    for each in (read(text, plain, start="auto"), read(text, adding, start="never")):
        assert torch.equal(each.ids, without.ids)
        assert each.fingerprint == without.fingerprint
    for each in (read(text, adding, start="auto"), read(text, plain, start="always")):
        assert each.bos == plain.bos_token_id
        assert each.ids.shape == (6, 16)
        assert (each.ids[:, 0] == each.bos).all()
        assert torch.equal(each.ids[:, 1:].flatten(), without.ids.flatten()[: 6 * 15])


def test_a_tokenizer_without_a_start_token_adds_none() -> None:
    bare = SimpleNamespace(bos_token_id=None)
    assert start_token(bare, "auto", "here") is None
    with pytest.raises(DataError, match="no start token"):
        start_token(bare, "always", "here")


def test_ready_made_tokens_are_taken_as_they_are(adding: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"ids": torch.arange(24).view(4, 6)}, tmp_path / "t.safetensors")
    source = parse_source(f"tokens:{tmp_path}/t.safetensors")
    found = load_sequences(source, adding, 2048, length=None, count=None, seed=None, start="auto")
    assert torch.equal(found.ids, torch.arange(24).view(4, 6))
    assert found.bos is None
    with pytest.raises(DataError, match="taken as they are"):
        load_sequences(source, adding, 2048, length=None, count=None, seed=None, start="always")


def test_examples_begin_with_it_too(adding: Any, plain: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"instruction": "Say", "output": "a list"}) + "\n")
    for source in (f"alpaca:{tmp_path}/t.jsonl", f"text:{text}"):
        (with_it, without) = (load_examples(parse_source(source), t, 2048, length=40) for t in (adding, plain))
        assert with_it.ids[0][0] == adding.bos_token_id
        assert torch.equal(with_it.ids[0][1:20], without.ids[0][:19])


@pytest.mark.parametrize("stride", [None, 1, 5, 14, 15, 16])
def test_windows_that_overlap_begin_with_it_once_and_score_every_token(stride: int | None) -> None:
    text = torch.arange(1, 1 + 15 * 7)
    ids = torch.cat((torch.zeros(7, 1, dtype=torch.long), text.view(7, 15)), dim=1)
    windows, step = scored_windows(ids, stride, bos=0)
    assert (windows[:, 0] == 0).all()
    assert (windows[:, 1:] > 0).all()
    if stride is None or stride >= 15:
        assert torch.equal(windows, ids)
    else:
        assert step == stride
        assert torch.equal(windows[1, 1:], text[stride : stride + 15])
    seen: list[int] = []

    class Model(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            seen.extend(input_ids[:, 0].tolist())
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 200))

        def get_input_embeddings(self) -> torch.nn.Module:
            return self

    found = perplexity(Model(1, 1), ids, stride=stride, bos=0)
    assert found.perplexity == pytest.approx(200)
    assert found.bos == 0
    assert set(seen) == {0}
    # Every token of the text that a window reaches is scored once: the first one too, which the start token predicts.
    assert found.tokens == (7 * 15 if stride is None or stride >= 15 else 15 + stride * ((15 * 7 - 15) // stride))


@pytest.fixture
def beginning(tmp_path: Path, adding: Any) -> Path:
    folder = tmp_path / "beginning"
    tiny_llama().save_pretrained(folder)
    adding.save_pretrained(folder)
    return folder


def test_report_evaluate_and_card_say_which(beginning: Path, text: Path, tmp_path: Path, rankwise: Run) -> None:
    texts = {"source": f"text:{text}", "length": 32, "sequences": 12}
    values = {"model": str(beginning), "method": "svd", "calibration": texts, "evaluation": texts}
    report = compress(recipe_from({**values, "output": str(tmp_path / "out")}), run_directory=tmp_path / "run").report
    assert report.calibration.bos == 0
    assert report.evaluation is not None
    assert report.evaluation.dense.bos == 0
    assert "begun by the start token" in (tmp_path / "out" / "README.md").read_text()
    words = ["evaluate", beginning, "--text", f"text:{text}", "--length", 32, "--sequences", 12]
    status, out, _ = rankwise(*words)
    assert status == 0
    assert "each begun by the start token 0" in out
    scores = {bos: json.loads(rankwise(*words, "--bos", bos, "--json")[1]) for bos in ("auto", "always", "never")}
    assert scores["auto"] == scores["always"]
    assert scores["auto"]["perplexity"] == pytest.approx(report.evaluation.dense.perplexity, rel=1e-6)
    assert scores["never"]["bos"] is None
    assert scores["never"]["perplexity"] != scores["auto"]["perplexity"]
    failed(rankwise(*words, "--bos", "sometimes"), "evaluation.bos")


def test_one_option_of_compress_is_for_every_text(
    tiny: Path, text: Path, tmp_path: Path, rankwise: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    given = ["--calibration", f"text:{text}", "--sequences", 8, "--length", 32, "--evaluation", f"text:{text}"]
    words = ["compress", tiny, "-o", tmp_path / "out", "--method", "svd", "--run-dir", tmp_path / "run", *given]
    status, out, err = rankwise(*words, "--bos", "always", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert [report["recipe"][part]["bos"] for part in ("calibration", "validation", "evaluation")] == ["always"] * 3
    assert report["calibration"]["bos"] == report["evaluation"]["dense"]["bos"] == 0
