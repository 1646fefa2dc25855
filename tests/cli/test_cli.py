"""The command line as a user meets it: output in its place, errors that help, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from conftest import Run, failed, tiny_llama
from rankwise import cli
from rankwise.reports import Report


@pytest.fixture
def compress(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> Run:
    """`rankwise compress` on the tiny model with small calibration; more options override."""

    def run(*words: Any, model: Any = tiny) -> tuple[int, str, str]:
        base = ["--calibration", f"text:{text}", "--sequences", 12, "--length", 32, "--set", "budget.rank_multiple=1"]
        return rankwise("compress", model, "--output", tmp_path / "out", "--method", "bolaco", *base, *words)

    return run


def _commands(group: Any, *words: str) -> list[tuple[str, ...]]:
    inside = getattr(group, "commands", {})
    return [words, *(found for name, each in inside.items() for found in _commands(each, *words, name))]


@pytest.mark.parametrize("words", _commands(typer.main.get_command(cli.app)), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...], rankwise: Run) -> None:
    status, out, err = rankwise(*words, "--help")
    assert (status, err) == (0, "")
    assert "Usage: " in out


def test_compress_evaluate_generate(compress: Run, rankwise: Run, text: Path, tmp_path: Path) -> None:
    status, out, _ = compress("--keep", 0.7, "--evaluation", f"text:{text}")
    assert status == 0
    assert "asked 0.7" in out
    assert "perplexity" in out
    assert "tokens/s" in out
    assert "tokens/s" not in compress("--keep", 0.7, "--evaluation", f"text:{text}", "--no-speed")[1]
    status, out, err = rankwise("evaluate", tmp_path / "out", "--text", f"text:{text}", "--length", 32, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    report = json.loads((tmp_path / "out" / "rankwise_report.json").read_text())
    assert found["perplexity"] == pytest.approx(report["evaluation"]["compressed"]["perplexity"], rel=1e-6)
    assert found["tokens"] == report["evaluation"]["compressed"]["tokens"]
    status, out, err = rankwise("generate", tmp_path / "out", "--prompt", "Return a", "--new-tokens", 4)
    assert (status, err) == (0, "")
    assert out.startswith("Return a")


def test_evaluate_without_options_scores_what_the_report_does(
    compress: Run, rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    more = ["--set", "evaluation.skip=3", "--set", "evaluation.sequences=5", "--set", "evaluation.stride=16"]
    assert compress("--evaluation", f"text:{text}", *more)[0] == 0
    report = Report.load(tmp_path / "out" / "rankwise_report.json")
    assert report.evaluation is not None
    for words in ((), ("--text", f"text:{text}")):
        status, out, err = rankwise("evaluate", tmp_path / "out", *words, "--json")
        assert (status, "those of the report" in err) == (0, True)
        assert json.loads(out)["tokens"] == report.evaluation.compressed.tokens
        assert json.loads(out)["perplexity"] == pytest.approx(report.evaluation.compressed.perplexity, rel=1e-5)
    own = json.loads(rankwise("evaluate", tmp_path / "out", "--text", f"text:{text}", "--length", 32, "--json")[1])
    assert own["tokens"] > report.evaluation.compressed.tokens
    failed(rankwise("evaluate", tiny), "no report names one", "--text")


def test_json_prints_the_report_and_nothing_else(compress: Run) -> None:
    status, out, _ = compress("--json", "--quiet")
    assert status == 0
    printed = json.loads(out)
    assert printed["format"] == "rankwise-report/1"
    assert Report.model_validate(printed).model_dump(mode="json") == printed


def test_quiet_says_nothing(compress: Run) -> None:
    assert compress("--quiet") == (0, "", "")


def test_recipes_and_options_that_override_them(rankwise: Run, compress: Run, tmp_path: Path) -> None:
    status, out, _ = rankwise("recipes", "ls")
    assert status == 0
    assert "lord-20" in out
    assert "role" in rankwise("recipes", "show", "lord-20")[1]
    (tmp_path / "mine.yaml").write_text("method: svd\nbudget: {keep: 0.5}\nmodel: elsewhere\n")
    (tmp_path / "bad.yaml").write_text("mehtod: svd\n")
    assert rankwise("recipes", "validate", tmp_path / "mine.yaml", "lord-30")[0] == 0
    status, out, err = rankwise("recipes", "validate", tmp_path / "mine.yaml", tmp_path / "bad.yaml")
    assert status == 2
    assert "did you mean 'method'" in err
    status, out, _ = compress("--recipe", tmp_path / "mine.yaml", "--json")
    report = json.loads(out)
    assert report["recipe"]["method"]["name"] == "bolaco"
    assert report["recipe"]["budget"] == {
        "keep": 0.5,
        "bits": None,
        "size": None,
        "rank_multiple": 1,
        "storage": "auto",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--keep", 0], "greater than 0"),
        (["--keep", 1.2], "less than or equal to 1"),
        (["--keep", 0.2, "--set", "budget.rank_multiple=16"], "lower budget.rank_multiple (16 now)"),
        (["--keep", 0.5, "--bits", 4], "give one of them"),
        (["--size", "9 pounds"], "is no size"),
        (["--size", "60KB"], "raise --size to"),
        (["--set", "budget.keeep=0.5"], "did you mean 'keep'"),
        (["--set", "nonsense"], "key=value"),
        (["--method", "svdd"], "did you mean 'svd'"),
        (["--allocation", "manual:zz=0.5"], "no role 'zz'"),
        (["--calibration", "text:/nowhere/at/all"], "no such file"),
        (["--length", 100], "longer than the model's context of 64"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--recipe", "nothing"], "no ready recipe"),
    ],
)
def test_bad_options_are_explained(compress: Run, words: list[Any], says: str) -> None:
    failed(compress(*words), says)


def test_missing_options_are_named(rankwise: Run, tiny: Path) -> None:
    failed(rankwise("compress", tiny), "No output")
    failed(rankwise("compress", "--output", "x"), "No model")


def test_bad_calibration_text(compress: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    failed(compress("--calibration", f"text:{tmp_path}/empty.txt"), "holds no text")
    (tmp_path / "short.txt").write_text("one short sentence")
    failed(compress("--calibration", f"text:{tmp_path}/short.txt"), "fewer than one sequence of 32")


def test_fewer_sequences_than_pooling_groups_is_said(compress: Run) -> None:
    status, _, err = compress()
    assert status == 0
    assert "12 pooling groups, not 32" in err


def test_damaged_models(compress: Run, tiny: Path, tmp_path: Path) -> None:
    weights = tiny / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    failed(compress(), "truncated", "model.safetensors")
    weights.write_bytes(b"")
    failed(compress(), "truncated", "model.safetensors")
    weights.unlink()
    failed(compress(), "holds no weights")
    tiny_llama().save_pretrained(tiny, max_shard_size="100KB")
    shard = sorted(tiny.glob("model-*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    failed(compress(), "missing", shard.name)
    save_file({"other": torch.ones(2)}, shard, metadata={"format": "pt"})
    failed(compress(), "lacks tensor", shard.name)
    shard.write_bytes(kept)
    assert compress()[0] == 0
    (tiny / "config.json").write_text("{")
    failed(compress(), "not JSON", "config.json")
    (tiny / "config.json").unlink()
    failed(compress(), "config.json", "missing")
    failed(compress("--overwrite", model=tmp_path / "nowhere"), "no such model directory")


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_at_random(compress: Run, tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    failed(compress(), "lack 1 tensors", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(compress: Run, tiny: Path, name: str, value: float) -> None:
    tensors = load_file(tiny / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    failed(compress(), "NaN or an infinity", name)


def test_activations_that_overflow_name_the_layer(compress: Run, tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    failed(compress(), "layers.1.mlp")


def test_models_of_another_kind(compress: Run, tiny: Path, tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    failed(compress(model=tmp_path / "bert"), "not a causal language model", "BertForMaskedLM")
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "t5", "architectures": ["T5ForCausalLM"]}))
    failed(compress(), "not a causal language model")
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "lalama"}))
    failed(compress(), "no architecture that transformers knows", "lalama")
    del config["model_type"]
    (tiny / "config.json").write_text(json.dumps(config))
    failed(compress(), "model_type")


def test_a_tokenizer_of_another_model(compress: Run, tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    tiny_llama(vocab_size=100).save_pretrained(tiny)
    failed(compress(), "outside the model's vocabulary of 100")


def test_an_output_of_somebody_elses(compress: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    failed(compress(), "not written by rankwise")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_evaluate_refuses_what_it_cannot_score(rankwise: Run, tiny: Path, text: Path) -> None:
    failed(rankwise("evaluate", tiny, "--text", f"text:{text}", "--length", 32, "--stride", 40), "stride of 40")
    failed(rankwise("evaluate", tiny, "--text", "nothing"), "no source of kind")
    failed(rankwise("evaluate", tiny, "--text", f"text:{text}", "--skip", 100000), "are skipped")


def test_the_version(rankwise: Run) -> None:
    from rankwise import __version__

    assert rankwise("--version")[1].strip() == __version__
