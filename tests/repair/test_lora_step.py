"""Adapters as a step of compress: what they move and what they leave, judged, undone, taken over and continued."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Run, failed
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import MissingPackageError, RecipeError
from rankwise.flows.compress import Compressed
from rankwise.recipes import recipe_from

Settings = Callable[..., dict[str, Any]]
stage_module: Any = importlib.import_module("rankwise.stages.repairing")


@pytest.fixture
def adapting(settings: Settings) -> Settings:
    """A recipe with adapters on the tiny model."""

    def make(method: Any = "two_sided", keep: float = 0.6, lora: Any = None, **changes: Any) -> dict[str, Any]:
        own = {"epochs": 1, "batch_size": 8, "rank": 4, **(lora or {})}
        base = {
            "method": method,
            "budget": {"keep": keep, "rank_multiple": 1},
            "validation": {"sequences": 8, "length": 32},
            "repair": {"steps": ["lora"], "lora": own},
        }
        return settings(**{**base, **changes})

    return make


PRUNER = {"name": "llm_pruner", "first": 0, "last": 0}


def weights(result: Compressed) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize("method", ["two_sided", PRUNER, {"name": "pruned", "multiple": 4}], ids=lambda m: str(m)[:20])
def test_adapters_are_merged_judged_and_taken_over(method: Any, adapting: Settings, tmp_path: Path) -> None:
    values = adapting(method)
    plain = compress(recipe_from({**values, "repair": {}}), run_directory=tmp_path / "run")
    result = compress(recipe_from(values), run_directory=tmp_path / "run")
    (step,) = result.report.repair
    assert (step.step, step.accepted) == ("lora", True)
    assert step.objective_after < step.objective_before
    assert step.trained_parameters
    assert len(step.history) == 5
    assert step.norm_lost_in_merging
    # Nothing was added: the same layers, of the same sizes, with other numbers.
    old, new = weights(plain), weights(result)
    assert {name: value.shape for name, value in old.items()} == {name: value.shape for name, value in new.items()}
    moved = {name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all("_proj" in name for name in moved)
    assert result.report.after == plain.report.after
    again = compress(recipe_from(values), run_directory=tmp_path / "run")
    assert all(torch.equal(value, new[name]) for name, value in weights(again).items())
    assert again.report.repair == result.report.repair


def test_what_lost_units_is_judged_by_the_original(adapting: Settings, tmp_path: Path) -> None:
    """By the model without its units, whose divergence from itself is zero, both would be the perplexity."""
    before = []
    for weight in (0.0, 4.0):
        values = adapting(PRUNER, objective={"kl_weight": weight})
        before.append(compress(recipe_from(values), run_directory=tmp_path / "run").report.repair[0].objective_before)
    assert before[1] > before[0] + 0.01


def test_a_training_that_was_stopped_goes_on(
    adapting: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = adapting(PRUNER, lora={"save_every": 2})
    whole = compress(recipe_from(values), run_directory=tmp_path / "whole")
    real = stage_module.train

    def stopped(*positional: Any, **named: Any) -> Any:
        def told(step: int, steps: int, loss: float) -> None:
            if step == 4:
                raise KeyboardInterrupt

        return real(*positional, **{**named, "step_done": told})

    with monkeypatch.context() as patched:
        patched.setattr(stage_module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe_from(values), run_directory=tmp_path / "run")
    assert list((tmp_path / "run").glob("repair-lora-*.partial/trainer/checkpoint-2"))
    again = compress(recipe_from(values), run_directory=tmp_path / "run")
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((tmp_path / "run").glob("repair-lora-*/trainer"))


def test_weights_that_are_undone_or_left_out_are_as_they_were(
    adapting: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = adapting(PRUNER, 0.8, exclude=["model.layers.0.mlp.*"])
    plain = compress(recipe_from({**values, "repair": {}}), run_directory=tmp_path / "run")
    result = compress(recipe_from(values), run_directory=tmp_path / "run")
    old, new = weights(plain), weights(result)
    assert result.report.repair[0].accepted
    for name in old:
        if "layers.0.mlp" in name:
            assert torch.equal(old[name], new[name]), name
    rising = iter(range(1, 1000))
    monkeypatch.setattr(stage_module, "judge_repair", lambda *_: float(next(rising)))
    undone = compress(recipe_from(values), run_directory=tmp_path / "other")
    assert not undone.report.repair[0].accepted
    assert any("repair lora was undone" in note for note in undone.report.notes)
    assert all(torch.equal(value, old[name]) for name, value in weights(undone).items())


def test_the_command_learns_from_instructions(rankwise: Run, adapting: Settings, tmp_path: Path) -> None:
    file, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [{"instruction": "list the object", "input": "", "output": "return the string " * 3} for _ in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = adapting()
    words = ["compress", values["model"], "-o", out, "--method", "llm_pruner", "--keep", 0.8]
    words += ["--calibration", values["calibration"]["source"], "--sequences", 40, "--length", 32]
    words += ["--set", "method.first=0", "--set", "method.last=0", "--set", "validation.sequences=8"]
    words += ["--run-dir", tmp_path / "run"]
    status, _, err = rankwise(*words, "--repair", "lora", "--data", f"alpaca:{file}", "--set", "repair.lora.epochs=1")
    assert status == 0, err
    report = json.loads((out / "rankwise_report.json").read_text())
    (step,) = report["repair"]
    assert step["examples"]["count"] == 16
    assert step["examples"]["source"] == f"alpaca:{file}"
    assert "- repair `lora`" in (out / "README.md").read_text()
    assert load_model(str(out)).model.config.rankwise["format"] == 6
    failed(rankwise(*words, "--repair", "lora", "--set", "repair.lora.merge=grow"), "give truncate")


def test_what_adapters_cannot_do_is_said(adapting: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("flap", "llm_pruner"):
        with pytest.raises(RecipeError, match="no factors to repair; of repairs it takes lora alone"):
            recipe_from(adapting(method, repair={"steps": "blocks,lora"}))
    with pytest.raises(RecipeError, match="of repairs it takes none"):
        recipe_from(adapting("slicegpt"))
    with pytest.raises(RecipeError, match="no repair knows codes"):
        recipe_from(adapting("pruned", budget={"bits": 3.0}))
    with pytest.raises(RecipeError, match="nothing of the original for adapters to learn from"):
        recipe_from(adapting(PRUNER, lora={"loss": "kl"}))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    monkeypatch.setattr("rankwise.stages.collect_statistics", None)
    with pytest.raises(MissingPackageError, match="LoRA needs peft"):
        compress(recipe_from(adapting()))
