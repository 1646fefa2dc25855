"""Slicing end to end: a checkpoint that any transformers loads, at the size that was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import ELSEWHERE, Run, failed
from rankwise import compress
from rankwise.checkpoints import empty_model, load_model
from rankwise.errors import BudgetError, ModelError, RecipeError
from rankwise.layers import NarrowNorm, narrowing
from rankwise.layers.needs import WITHOUT_FORM, unmet
from rankwise.models import find_sites
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from
from rankwise.sizes import Plan
from rankwise.stages import slicing
from sliced_families import SIDE_BY_SIDE, of_family

Settings = Callable[..., dict[str, Any]]
IDS = torch.arange(3, 27)[None]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A tiny Qwen2 with tied embeddings, biases and a vocabulary in bfloat16."""
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Qwen2Config(
        **shape, **heads, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def family(name: str, folder: Path, **changes: Any) -> Path:
    """A directory with a tiny model of a family and the tokenizer of the others here."""
    of_family(name, **{"vocab_size": 2048, "pad_token_id": None, **changes}).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "source")
    return folder / "source"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def sliced(settings: Settings, **changes: Any) -> dict[str, Any]:
    method = {"name": "slicegpt", "multiple": 1, **changes.pop("method", {})}
    return settings(**{"method": method, "budget": {"keep": 0.8}, **changes})


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_sliced_checkpoint_is_whole(kind: str, settings: Settings, qwen: Path, tiny: Path, tmp_path: Path) -> None:
    """Loaded by transformers it gives the logits of the model in memory, with and without a cache."""
    source, out = (qwen if kind == "qwen2" else tiny), tmp_path / "out"
    before = load_model(str(source))
    result = compress(recipe_from(sliced(settings, model=str(source), output=str(out))))
    config = json.loads((out / "config.json").read_text())
    stream, width = config["rankwise"]["stream"], before.model.config.hidden_size
    kept = stream["kept"]
    assert config["rankwise"]["format"] == 6
    assert (config["hidden_size"], stream["width"], config["tie_word_embeddings"]) == (width, width, False)
    assert stream["adapters"] == [[[kept, kept], [kept, kept]], [[kept, kept], [width, kept]]]

    torch.save(logits_of(result.model), tmp_path / "logits.pt")
    words = [sys.executable, "-c", ELSEWHERE, str(out), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.strip().endswith("fine"), done.stderr

    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto").eval()
    assert torch.equal(logits_of(model), logits_of(result.model))
    assert model.lm_head.weight.shape == (2048, width)
    assert torch.equal(model.lm_head.weight.float(), before.model.lm_head.weight)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    first, second = (model.float().generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(first, second)

    again = load_model(str(out))
    assert isinstance(again.model.model.layers[0].input_layernorm, NarrowNorm)
    assert [site.name for site in find_sites(empty_model(str(out)))] == [site.name for site in find_sites(again.model)]
    linears = sum(site.parameters for site in find_sites(again.model))
    whole = sum(site.parameters for site in find_sites(before.model))
    report, plan = result.report, Plan.load(out / "plan.json")
    assert (report.before.linear_parameters, report.after.linear_parameters) == (whole, linears)
    assert report.keep.got == plan.kept == linears / whole <= 0.8
    assert (plan.whole_weights, report.coded) == (whole, False)
    assert report.after.parameters == sum(p.numel() for p in again.model.parameters())
    assert report.groups["q"] == kept / width
    assert report.groups["down"] == (kept + width) / (2 * width)
    assert report.model_fingerprint == plan.fingerprint
    with pytest.raises(ModelError, match="compressed already"):
        compress(recipe_from(sliced(settings, model=str(out))))


@pytest.mark.long
@pytest.mark.parametrize("name", ["opt", "phi, tied", "gptj", "gpt2", "stablelm", "falcon-7b"])
def test_a_sliced_checkpoint_of_another_form_is_whole(name: str, settings: Settings, tmp_path: Path) -> None:
    source, out = family(name, tmp_path), tmp_path / "out"
    changes = {"embeddings": "8bit", "head": "8bit"} if name == "gpt2" else {}
    result = compress(recipe_from(sliced(settings, model=str(source), output=str(out), **changes)))
    entry = json.loads((out / "config.json").read_text())["rankwise"]
    assert entry["format"] == 9
    assert entry["stream"]["form"]["parallel"] is (name in SIDE_BY_SIDE)
    assert "reads formats 1 to 8" in unmet(entry, known=WITHOUT_FORM)
    torch.save(logits_of(result.model), tmp_path / "logits.pt")
    words = [sys.executable, "-c", ELSEWHERE, str(out), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.strip().endswith("fine"), done.stderr
    again = load_model(str(out))
    assert torch.equal(logits_of(again.model), logits_of(result.model))
    linears = sum(site.parameters for site in find_sites(again.model))
    assert result.report.keep.got == linears / result.report.before.linear_parameters <= 0.8
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    first, second = (again.model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(first, second)


def test_what_a_form_of_its_own_adds_to_a_checkpoint(settings: Settings, tmp_path: Path) -> None:
    """A stream of LayerNorms with the names of Llama, whose readers have biases, is what an older reader knows."""
    source = family("starcoder2", tmp_path)
    values = sliced(settings, model=str(source), output=str(tmp_path / "out"), budget={"keep": 0.9})
    result = compress(recipe_from(values))
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["rankwise"]
    assert (entry["format"], "form" in entry["stream"]) == (6, False)
    assert torch.equal(logits_of(load_model(str(tmp_path / "out")).model), logits_of(result.model))


@pytest.mark.parametrize("name", ["stablelm", "neox"])
def test_no_plain_checkpoint_is_made_of_what_it_cannot_say(name: str, settings: Settings, tmp_path: Path) -> None:
    values = sliced(settings, model=str(family(name, tmp_path)), method={"adapters": "none"})
    with pytest.raises(ModelError, match="plain checkpoint") as raised:
        compress(recipe_from(values))
    assert "ForCausalLM" in str(raised.value)
    assert "adapters=full" in str(raised.value)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_one_rotation_gives_a_plain_checkpoint(
    kind: str, settings: Settings, qwen: Path, tiny: Path, tmp_path: Path
) -> None:
    source, out = (qwen if kind == "qwen2" else tiny), tmp_path / "out"
    before = load_model(str(source)).model.config
    values = sliced(settings, model=str(source), output=str(out), method={"adapters": "none"})
    result = compress(recipe_from(values))
    config = json.loads((out / "config.json").read_text())
    # A Llama's width is a multiple of its heads, a Qwen2's anything.
    kept = int(0.8 * before.hidden_size) if kind == "qwen2" else 24
    assert (config["hidden_size"], config["head_dim"], config["model_type"]) == (kept, 8, kind)
    assert "rankwise" not in config
    assert not (out / "modeling_rankwise.py").exists()
    assert result.report.keep.got == kept / before.hidden_size
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert torch.equal(logits_of(model), logits_of(result.model))
    again = compress(recipe_from({**values, "format": "dense", "output": str(tmp_path / "dense")}))
    assert again.report.bytes_on_disk == result.report.bytes_on_disk


def test_what_was_sliced_is_taken_over_and_another_size_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []
    real = narrowing.principal_directions
    monkeypatch.setattr(narrowing, "principal_directions", lambda moment: (calls.append(1), real(moment))[1])
    evaluation = {**settings()["calibration"], "speed": False}

    def run(keep: float) -> Any:
        values = sliced(settings, budget={"keep": keep}, evaluation=evaluation, method={"multiple": 8})
        return compress(recipe_from(values), run_directory=tmp_path / "run")

    first, second = run(0.9), run(0.9)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    less = run(0.5)
    assert len(calls) == 8
    scores = [result.report.evaluation.compressed.perplexity for result in (first, second, less)]
    assert scores[0] == scores[1] != scores[2]
    assert first.report.evaluation == second.report.evaluation


def test_what_cannot_be_met_says_what_can(settings: Settings, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="1 of 32 coordinates") as raised:
        compress(recipe_from(sliced(settings, budget={"keep": 0.01})))
    assert "raise --keep to 0.1483 or more" in str(raised.value)
    with pytest.raises(BudgetError, match="No multiple of 64"):
        compress(recipe_from(sliced(settings, method={"multiple": 64})))
    with pytest.raises(RecipeError, match="no place for the adapters"):
        compress(recipe_from(sliced(settings, format="dense", output=str(tmp_path / "out"))))
    with pytest.raises(RecipeError, match="whole in memory"):
        compress(recipe_from(sliced(settings, memory="blocks")))
    assert not (tmp_path / "out").exists()
    for changes, why in (
        ({"budget": {"keep": None}}, "needs a size"),
        ({"allocation": "spectral"}, "nothing to decide"),
        ({"repair": {"steps": ["refit"]}}, "slicegpt"),
    ):
        with pytest.raises(RecipeError, match=why):
            recipe_from(sliced(settings, **changes))


@pytest.mark.parametrize(("name", "size"), [("opt", 700_000), ("gptj", 620_000)])
def test_a_size_in_bytes_counts_positions_and_biases_that_are_added(
    name: str, size: int, settings: Settings, tmp_path: Path
) -> None:
    source = family(name, tmp_path, max_position_embeddings=512, n_positions=512)
    values = sliced(settings, model=str(source), budget={"size": size}, output=str(tmp_path / "out"))
    result = compress(recipe_from(values))
    assert 0.9 * size < (result.report.bytes_on_disk or 0) <= size


@pytest.mark.parametrize("adapters", ["full", "none"])
def test_a_size_in_bytes_is_kept_though_a_tied_head_becomes_its_own(
    adapters: str, settings: Settings, qwen: Path, tmp_path: Path
) -> None:
    size = 400_000 if adapters == "full" else 300_000
    values = sliced(settings, model=str(qwen), budget={"size": size}, method={"adapters": adapters})
    result = compress(recipe_from({**values, "output": str(tmp_path / "out")}))
    assert 0.9 * size < (result.report.bytes_on_disk or 0) <= size
    assert result.report.bits is not None
    assert result.report.bits.got == 16 * result.report.keep.got
    with pytest.raises(BudgetError, match="Nothing fits"):
        compress(recipe_from({**values, "budget": {"size": 10_000}}))


def test_a_stream_that_is_not_finite_is_said(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise ValueError("the second moment is not finite")

    monkeypatch.setattr(slicing, "slice_with_adapters", nothing)
    with pytest.raises(Exception, match="cannot be decomposed"):
        compress(recipe_from(sliced(settings)))


def test_the_command_line_slices(tiny: Path, text: Path, tmp_path: Path, rankwise: Run) -> None:
    out, words = tmp_path / "out", ("compress", tiny, "--method", "slicegpt", "--calibration", f"text:{text}")
    calibration = ("--set", "calibration.length=32", "--set", "calibration.sequences=8")
    status, _, err = rankwise(*words, "--keep", 0.9, "--output", out, *calibration)
    assert status == 0, err
    assert "24 of 32 coordinates" in json.loads((out / "rankwise_report.json").read_text())["notes"][0]
    status, _, err = rankwise("plan", "show", out / "plan.json")
    assert status == 0, err
    failed(rankwise(*words, "--keep", 0.1, "--output", out, *calibration), "8 of 32 coordinates", "raise --keep to")
