"""Units taken out end to end: a smaller model that any transformers loads, at the size that was asked for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from conftest import ELSEWHERE, Run, failed
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.errors import BudgetError, ModelError, RecipeError
from rankwise.models import find_sites, places_of
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from
from rankwise.sizes import Plan

Settings = Callable[..., dict[str, Any]]
IDS = torch.arange(3, 27)[None]
METHODS = ["flap", "llm_pruner", "pruned"]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def pruned(settings: Settings, name: str, keep: float = 0.7, **changes: Any) -> dict[str, Any]:
    own = {"name": name, **({"first": 0, "last": 0} if name == "llm_pruner" else {}), **changes.pop("method", {})}
    return settings(**{"method": own, "budget": {"keep": keep, "rank_multiple": 1}, **changes})


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A tiny Qwen2, which has no place for the bias of o and of down."""
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64}
    config = Qwen2Config(**shape, **heads, initializer_range=0.1, bos_token_id=0, eos_token_id=1)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


@pytest.mark.long
@pytest.mark.parametrize(("method", "kind"), [("flap", "qwen2"), ("llm_pruner", "llama"), ("pruned", "llama")])
def test_a_checkpoint_without_units_is_whole(
    method: str, kind: str, settings: Settings, tiny: Path, qwen: Path, tmp_path: Path
) -> None:
    source, out = (qwen if kind == "qwen2" else tiny), tmp_path / "out"
    before = load_model(str(source))
    # With a layer that is protected, layers differ.
    own = {"method": {"first": 1}} if method == "llm_pruner" else {}
    result = compress(recipe_from(pruned(settings, method, model=str(source), output=str(out), **own)))
    torch.save(logits_of(result.model), tmp_path / "logits.pt")
    words = [sys.executable, "-c", ELSEWHERE, str(out), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.strip().endswith("fine"), done.stderr

    config, plan, report = json.loads((out / "config.json").read_text()), Plan.load(out / "plan.json"), result.report
    assert config["rankwise"]["format"] == 6
    assert plan.stays
    for index, block in enumerate(result.model.model.layers):
        # What the config says of a layer in the form that transformers knows, and what there is.
        own = {**config, **config.get("per_layer_config", {}).get(str(index), {})}
        up = plan.shapes[f"model.layers.{index}.mlp.up_proj"]
        kept = plan.stays.get(f"model.layers.{index}.mlp")
        assert up[0] == own["intermediate_size"] == (len(kept) if kept else 80)
        assert (
            own["num_attention_heads"] * block.self_attn.head_dim
            == plan.shapes[f"{'model.layers'}.{index}.self_attn.q_proj"][0]
        )
    model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto").eval().float()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    first, second = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    static = model.generate(IDS, cache_implementation="static", **options)
    assert torch.equal(first, second)
    assert torch.equal(first, static)

    whole = sum(site.parameters for site in find_sites(before.model))
    assert report.before.linear_parameters == plan.weights == whole
    assert report.keep.got == plan.kept <= 0.7
    assert plan.kept > 0.66
    if method != "pruned":
        assert report.after.linear_parameters == plan.kept * whole
    assert report.after.parameters == sum(p.numel() for p in result.model.parameters())
    biases = [name for name, _ in result.model.named_parameters() if name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert bool(biases) == (method != "llm_pruner")
    assert report.model_fingerprint == plan.fingerprint
    with pytest.raises(ModelError, match="compressed already"):
        compress(recipe_from(pruned(settings, method, model=str(out))))


def test_equal_layers_give_a_plain_checkpoint(settings: Settings, tiny: Path, tmp_path: Path) -> None:
    for number, (method, extra) in enumerate(
        [("llm_pruner", {"multiple": 4}), ("flap", {"structure": "UL-UM"}), ("llm_pruner", {"compensation": "linear"})]
    ):
        out = tmp_path / f"{number}"
        values = pruned(settings, method, output=str(out), format="dense", method={"equal": True, **extra})
        result = compress(recipe_from(values))
        config = json.loads((out / "config.json").read_text())
        assert "rankwise" not in config
        assert "per_layer_config" not in config
        assert config["model_type"] == "llama"
        assert config["intermediate_size"] < 80
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert torch.equal(logits_of(model), logits_of(result.model))


@pytest.mark.parametrize("method", METHODS)
def test_pruning_is_taken_over(
    method: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run, and one whose process was killed while it wrote, give the same weights."""
    values = pruned(settings, method, output=str(tmp_path / "one"))
    first = compress(recipe_from(values), run_directory=tmp_path / "run")
    monkeypatch.setattr("rankwise.stages.pruning.decide", None)
    again = compress(recipe_from({**values, "output": str(tmp_path / "two")}), run_directory=tmp_path / "run")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    names = ("model.safetensors", "plan.json")
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on(settings: Settings, tmp_path: Path) -> None:
    values = pruned(settings, "pruned", output=str(tmp_path / "out"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    program = (
        "import os, signal, sys, yaml\nfrom rankwise import compress\nfrom rankwise.recipes import recipe_from\n"
        "from rankwise.stages import pruning\n"
        "pruning.shrink = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "compress(recipe_from(yaml.safe_load(open(sys.argv[1]))), run_directory=sys.argv[2])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(recipe), str(tmp_path / "run")], capture_output=True)
    # The first call of `shrink` here is that which takes units out: what tries couplings has a name of its own.
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert not (tmp_path / "out").exists()
    went_on = compress(recipe_from(values), run_directory=tmp_path / "run")
    fresh = compress(recipe_from({**values, "output": str(tmp_path / "fresh")}), run_directory=tmp_path / "other")
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, went_on.model.state_dict()[name])


def test_a_plan_takes_the_same_units_out(settings: Settings, tmp_path: Path) -> None:
    first = compress(recipe_from(pruned(settings, "pruned", output=str(tmp_path / "one"))))
    plan = str(tmp_path / "one" / "plan.json")
    again = compress(recipe_from(pruned(settings, "pruned", allocation=f"plan:{plan}")))
    assert again.plan.stays == first.plan.stays
    assert again.plan.cuts == first.plan.cuts
    with pytest.raises(BudgetError, match="made for another size"):
        compress(recipe_from(pruned(settings, "pruned", 0.6, allocation=f"plan:{plan}")))
    broken = json.loads(Path(plan).read_text())
    broken["stays"] = {name: [5000] for name in broken["stays"]}
    Path(plan).write_text(json.dumps(broken))
    with pytest.raises(BudgetError, match="has none of that number"):
        compress(recipe_from(pruned(settings, "pruned", allocation=f"plan:{plan}")))
    Path(plan).write_text(json.dumps({**broken, "stays": {name: [1, 0] for name in broken["stays"]}}))
    with pytest.raises(BudgetError, match="not in ascending order"):
        compress(recipe_from(pruned(settings, "pruned", allocation=f"plan:{plan}")))


def test_what_makes_up_for_units_loses_less(settings: Settings) -> None:
    """Nothing, a bias, a linear map: on the calibration text the error of the logits is least with the last."""
    dense = load_model(settings()["model"])
    source = parse_source(settings()["calibration"]["source"])
    ids = load_sequences(source, dense.tokenizer, dense.vocabulary, length=32, count=40, seed=None).ids

    @torch.no_grad()
    def said(model: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    errors = []
    for compensation in ("none", "bias", "linear"):
        values = pruned(settings, "flap", 0.6, method={"compensation": compensation, "structure": "UL-UM"})
        errors.append(float((said(compress(recipe_from(values)).model) - said(dense.model)).square().mean()))
    assert min(errors) == errors[2]


def test_few_bits_and_units_share_a_budget(settings: Settings, tmp_path: Path) -> None:
    values = pruned(settings, "pruned", output=str(tmp_path / "out"))
    values["budget"] = {"bits": 2.5}
    values["calibration"] = {**values["calibration"], "sequences": 12}
    recipe = recipe_from(values)
    assert recipe.method.rest == "mixed"  # type: ignore[union-attr]
    result = compress(recipe)
    assert result.plan.bits_a_weight <= 2.5
    promised = result.plan.kept_bits / 8 + sum(
        p.numel() * p.element_size()
        for name, p in result.model.named_parameters()
        if not name.startswith("model.layers") or "norm" in name
    )
    assert promised <= (tmp_path / "out" / "model.safetensors").stat().st_size <= promised + 40_000
    assert result.report.coded
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto").eval()
    assert torch.allclose(logits_of(model), logits_of(result.model), atol=1e-4)
    assert recipe_from({**values, "budget": {"keep": 0.5}}).method.rest == "two_sided"  # type: ignore[union-attr]


def test_adapters_recover_what_lost_units(rankwise: Run, settings: Settings, text: Path, tmp_path: Path) -> None:
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    compress(recipe_from(pruned(settings, "llm_pruner", 0.6, output=str(out))))
    words = ["finetune", out, "--data", f"text:{text}", "--length", 32, "-o", tuned]
    status, _, err = rankwise(*words, "--method", "lora", "--epochs", "0.2", "--held-out", 8)
    assert status == 0, err
    old, new = (load_model(str(folder)).model for folder in (out, tuned))
    assert [p.shape for p in old.parameters()] == [p.shape for p in new.parameters()]
    moved = [name for name, p in new.named_parameters() if not torch.equal(p, old.get_parameter(name))]
    assert moved
    assert all(name.endswith("proj.weight") for name in moved)
    failed(rankwise(*words[:-1], tmp_path / "no", "--method", "subspace"), "takes --method lora")


def test_what_cannot_be_done_is_said_before_anything_slow(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.stages.pruning.collect_requests", None)
    with pytest.raises(BudgetError, match=r"raise --keep to 0\.\d+ or more"):
        compress(recipe_from(pruned(settings, "flap", 0.05)))
    with pytest.raises(BudgetError, match="or protect fewer layers"):
        compress(recipe_from(pruned(settings, "llm_pruner", 0.3, method={"first": 1, "last": 0})))
    with pytest.raises(RecipeError, match="whole in memory"):
        compress(recipe_from(pruned(settings, "flap", memory="blocks")))
    with pytest.raises(RecipeError, match="here they differ"):
        compress(recipe_from(pruned(settings, "flap", format="dense", output=str(tmp_path / "out"))))
    with pytest.raises(BudgetError, match=r"raise --keep to 0\.\d+ or more"):
        compress(recipe_from(pruned(settings, "pruned", 0.01, method={"multiple": 40})))
    for method, allocation, asked in (
        ("pruned", "manual:q=0.5", "bayesian or spectral"),
        ("flap", "bayesian", "uniform"),
    ):
        with pytest.raises(RecipeError, match=f"makes it another: give {asked}"):
            recipe_from(pruned(settings, method, allocation=allocation))
    with pytest.raises(RecipeError, match="with a linear compensation"):
        recipe_from(pruned(settings, "pruned", method={"compensation": "bias"}))
    with pytest.raises(RecipeError, match="leaves no factors to repair"):
        recipe_from(pruned(settings, "flap", repair={"steps": ["refit"]}))


def test_repairs_run_on_what_is_left(settings: Settings) -> None:
    values = pruned(settings, "pruned", 0.5, repair={"steps": ["refit", "blocks"], "blocks": {"epochs": 1}})
    values["validation"] = {"sequences": 8}
    result = compress(recipe_from(values))
    assert [step.step for step in result.report.repair] == ["refit", "blocks"]
    # What each role keeps is of the original, ranks counted: together it is what all keep.
    whole, places = dict.fromkeys(result.plan.groups, 0), places_of(result.plan.originals)
    for name, (m, n) in result.plan.originals.items():
        whole[places[name][1]] += m * n
    kept = sum(share * whole[role] for role, share in result.plan.groups.items())
    assert kept / sum(whole.values()) == pytest.approx(result.plan.kept)
    assert not all(cut.dense for cut in result.plan.cuts.values())
