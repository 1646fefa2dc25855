"""What an earlier version wrote still loads: checkpoints of format 3, plans of format 1, and their reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, Run, failed
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.recipes import recipe_from
from rankwise.sizes import DENSE, Cut, Plan

OLD = ROOT / "tests" / "fixtures" / "written-by-0.1.0"
"""Made by rankwise 0.1.0 from a random Llama of two blocks: two factors, pivot rows, codes, and bits spread by loss."""

NAMES = ("two_factor", "pivoted", "quantized", "mixed_bits")


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_written_before_score_the_same(name: str) -> None:
    loaded = load_model(str(OLD / name))
    with torch.no_grad():
        found = loaded.model(input_ids=torch.arange(3, 27)[None]).logits[0, -1]
    expected = torch.tensor(json.loads((OLD / name / "logits.json").read_text()))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def old_size(values: dict[str, Any]) -> float:
    """Bits of all sites as the first format counted them."""
    total = 0
    for name, rank in values["ranks"].items():
        m, n = values["shapes"][name]
        if name in values["q_bits"]:
            form, bits = values["form"], values["q_bits"][name]
            eights = [8 * -(-size // 8) for size in (m, n)]
            total += sum(eights) + m * eights[1] * bits + 16 * m + rank * (form["lr_bits"] * sum(eights) + 32)
        elif rank is None:
            total += 16 * m * n
        else:
            total += 16 * rank * (m + n - (rank if values["storage"] == "pivoted" else 0))
    return total


@pytest.mark.parametrize("name", NAMES)
def test_plans_written_before_say_the_same(name: str, tmp_path: Path) -> None:
    values = json.loads((OLD / name / "plan.json").read_text())
    assert values["format"] == "rankwise-plan/1"
    plan = Plan.load(OLD / name / "plan.json")
    assert plan.kept_bits == old_size(values)
    assert (plan.keep, plan.bits) == (values["keep"], values["bits"])
    for site, rank in values["ranks"].items():
        lr_bits = values["form"]["lr_bits"] if values["form"] and rank else None
        assert plan.cuts[site] == (DENSE if rank is None else Cut(rank, values["q_bits"].get(site, 0), lr_bits))
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("name", ["two_factor", "pivoted", "quantized"])
def test_a_plan_written_before_makes_the_same_model(name: str, tmp_path: Path) -> None:
    """Same cuts, statistics and arithmetic: weights are the same up to the rounding of their type.

    Labels are drawn in another way since: of what hangs on them the form alone is the same.
    """
    report = json.loads((OLD / name / "rankwise_report.json").read_text())
    budget = {"storage": report["storage"]} if name != "quantized" else {}
    values = {
        "model": str(OLD / "source"),
        "method": report["recipe"]["method"],
        "budget": {**budget, "rank_multiple": report["recipe"]["budget"]["rank_multiple"]},
        "allocation": f"plan:{OLD / name / 'plan.json'}",
        "calibration": {"source": f"tokens:{OLD / 'source' / 't.safetensors'}", "sequences": 16},
    }
    if name != "quantized":
        values["budget"]["keep"] = report["keep"]["asked"]
    found = compress(recipe_from(values), run_directory=tmp_path).model
    before = load_model(str(OLD / name), precision="stored").model
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (found, before)]
    assert shapes[0] == shapes[1]
    if name == "quantized":
        for key, tensor in before.state_dict().items():
            assert torch.equal(found.state_dict()[key].to(tensor.dtype), tensor), key
    if report["recipe"]["method"].get("labels") == "sampled":
        return
    replaced = [path for path, module in before.named_modules() if hasattr(module, "dense_weight")]
    assert len(replaced) > 3
    for path in replaced:
        new, old = (model.get_submodule(path).dense_weight().float() for model in (found, before))
        assert float((new - old).norm() / old.norm()) < 0.005, path


def test_finetune_goes_on_with_what_was_written_before(rankwise: Run, tmp_path: Path) -> None:
    data = f"tokens:{OLD / 'source' / 't.safetensors'}"
    common = ["--data", data, "--loss", "lm", "--epochs", 1, "--held-out", 4, "--json"]
    for name, method in (("two_factor", "full-factors"), ("pivoted", "full-factors"), ("quantized", "lowrank")):
        shutil.copytree(OLD / name, tmp_path / name)
        status, out, err = rankwise(
            "finetune", tmp_path / name, "--method", method, "-o", tmp_path / f"{name}-2", *common
        )
        assert status == 0, err
        assert json.loads(out)["finetune"][0]["trained_parameters"] > 0
        load_model(str(tmp_path / f"{name}-2"))


def test_a_plan_that_does_not_say_how_wide_numbers_are_is_counted_by_the_checkpoint(
    rankwise: Run, settings: Any, tmp_path: Path
) -> None:
    """The first format left that out for low rank: a checkpoint in float32 has 32 bits a number."""
    made = compress(recipe_from(settings(output=str(tmp_path / "out"), budget={"keep": 0.6, "storage": "two_factor"})))
    values = made.plan.model_dump(mode="json", exclude={"cuts", "form", "size", "format"})
    ranks = {name: cut.rank for name, cut in made.plan.cuts.items()}
    old = {**values, "format": "rankwise-plan/1", "ranks": ranks, "storage": "two_factor"}
    (tmp_path / "out" / "plan.json").write_text(json.dumps(old))
    common = ["--data", settings()["calibration"]["source"], "--loss", "lm", "--epochs", 1, "--length", 32, "--json"]
    status, out, err = rankwise("finetune", tmp_path / "out", "-o", tmp_path / "tuned", *common)
    assert status == 0, err
    assert Plan.load(tmp_path / "tuned" / "plan.json").form.number_bits == 32
    report = json.loads(out)
    assert report["keep"]["got"] == pytest.approx(made.plan.kept)


def test_what_a_config_says_of_its_decoder_is_never_run(rankwise: Run, tmp_path: Path) -> None:
    """It stands in the text of the classes that are built, which is run."""
    shutil.copytree(OLD / "two_factor", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    mark = tmp_path / "ran"
    config["rankwise"]["decoder"] = f'model"; open({str(mark)!r}, "w"); x = "'
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    failed(rankwise("generate", tmp_path / "model", "--prompt", "x"), "names a decoder that is no name")
    assert not mark.exists()


def test_a_format_of_another_version_is_refused_by_name(rankwise: Run, tmp_path: Path) -> None:
    shutil.copytree(OLD / "two_factor", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rankwise"]["format"] = 99
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    failed(rankwise("generate", tmp_path / "model", "--prompt", "x"), "format 99", "reads formats 1 to")
    (tmp_path / "plan.json").write_text('{"format": "rankwise-plan/9"}')
    source = str(OLD / "source")
    refused = rankwise("compress", source, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    failed(refused, "rankwise-plan/9", "another version")
