"""Quantised checkpoints end to end: sizes, loading, plans of bits, kills, training of L and R, and bad input."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import ELSEWHERE, IDS, KILLED, Run, failed, tiny_llama
from rankwise import compress
from rankwise.allocation import Problem, fill
from rankwise.checkpoints import REPORT_FILE, fingerprint, load_model
from rankwise.errors import BudgetError, NotFiniteError, RecipeError
from rankwise.flows.finetune import finetune
from rankwise.layers import QuantizedLinear, cache_dense
from rankwise.methods.caldera import Caldera
from rankwise.methods.quantize import Quantize
from rankwise.models import Site
from rankwise.progress import Reporter
from rankwise.recipes import FineTune, recipe_from
from rankwise.repair import LowRankFactors
from rankwise.reports import Report
from rankwise.sizes import DENSE, Allowance, Budget, Cut, Form, Plan

Settings = Callable[..., dict[str, Any]]

CALDERA = {"name": "caldera", "q_bits": 2, "rank": 8, "lr_bits": 4, "outer": 3, "inner": 3}
NAME = "model.layers.0.mlp.up_proj"
BITS = {"bits": 4.0, "rank_multiple": 1}


@pytest.fixture
def small(settings: Settings) -> Settings:
    """A recipe's mapping for CALDERA on the tiny model."""

    def make(**changes: Any) -> dict[str, Any]:
        values = settings(**{"method": CALDERA, **changes})
        if "budget" not in changes:
            del values["budget"]
        return values

    return make


@pytest.fixture
def quantised(small: Settings, tmp_path: Path) -> Path:
    compress(recipe_from(small(output=str(tmp_path / "small"))))
    return tmp_path / "small"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits


def site_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    everything = load_file(folder / "model.safetensors")
    return {key.removeprefix(prefix): t for key, t in everything.items() if key.startswith(prefix)}


METHODS = [
    CALDERA,
    {**CALDERA, "lr_bits": 16},
    {**CALDERA, "q_bits": 4, "codebook": "nf", "group": 16, "hadamard": False, "lr_bits": 3},
    {**CALDERA, "q_bits": 3, "row_scales": False, "lr_bits": 8},
    {**CALDERA, "q_bits": 0},
    {"name": "quantize", "q_bits": 5, "codebook": "uniform"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_files_hold_the_bits_that_are_counted(method: dict[str, Any], small: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = compress(recipe_from(small(method=method, output=str(output))))
    for name in result.plan.shapes:
        assert 8 * sum(t.nbytes for t in site_tensors(output, name).values()) == result.plan.site_bits(name), name
    report = json.loads((output / REPORT_FILE).read_text())
    assert report["bits"]["got"] == pytest.approx(8 * report["after"]["linear_bytes"] / result.plan.weights, rel=1e-12)
    with (output / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert report["bytes_on_disk"] == header + report["after"]["bytes"]


@pytest.mark.long
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_quantised_checkpoint_gives_the_same_logits_without_rankwise(
    tied: bool, dtype: torch.dtype, small: Settings, tiny: Path, tmp_path: Path
) -> None:
    (tiny / "model.safetensors").unlink()
    tiny_llama(tie_word_embeddings=tied, intermediate_size=76).to(dtype).save_pretrained(tiny)
    output = tmp_path / "out"
    result = compress(recipe_from(small(output=str(output), max_shard_size="100KB")))
    torch.save(logits(result.model), tmp_path / "logits.pt")
    arguments = [str(output), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # rankwise reads the same, in the precision of the file.
    assert torch.equal(logits(load_model(str(output), precision="stored").model), logits(result.model))


def test_weights_may_be_decoded_once(small: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(recipe_from(small(output=str(output))))
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(output, rankwise_cache_dense=False, **options)
    cached = AutoModelForCausalLM.from_pretrained(output, rankwise_cache_dense=True, **options)
    assert cached.model.layers[0].mlp.up_proj.cache
    assert not model.model.layers[0].mlp.up_proj.cache
    torch.testing.assert_close(logits(cached), logits(model), atol=1e-4, rtol=1e-4)
    ours = load_model(str(output)).model
    before = logits(ours)
    cache_dense(ours, True)
    torch.testing.assert_close(logits(ours), before, atol=1e-4, rtol=1e-4)
    assert logits(ours).equal(logits(ours))
    cache_dense(ours, False)
    assert torch.equal(logits(ours), before)


def test_by_default_weights_are_decoded_once_where_memory_allows_and_that_is_said(
    small: Settings, text: Path, rankwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    output = tmp_path / "out"
    result = compress(recipe_from(small(output=str(output), evaluation={"source": f"text:{text}", "length": 32})))
    assert result.report.speed is not None
    assert result.report.speed.decoded_once
    assert not result.model.model.layers[0].mlp.up_proj.cache

    def kept(room: int) -> list[bool]:
        model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
        # The modelling file has functions of its own.
        monkeypatch.setattr(sys.modules[type(model).__module__], "free_memory", lambda: room)
        layers = [module for module in model.modules() if type(module).__name__ == "QuantizedLinear"]
        logits(model)
        found = [layer._kept is not None for layer in layers]
        # Whatever is trained is decoded anew.
        model(input_ids=torch.tensor([[3, 4]]))
        assert all(layer._kept is None for layer in layers)
        return found

    assert all(kept(1 << 30))
    assert not any(kept(1 << 10))
    said = [each.getMessage() for each in caplog.records if "quantised weights" in each.getMessage()]
    assert [("once" in each, "every pass" in each) for each in said] == [(True, False), (False, True)]
    for words, named in (((), True), (("--dense-cache",), False), (("--no-dense-cache",), False)):
        status, _, err = rankwise("generate", output, "--prompt", "Return a", "--new-tokens", 1, *words)
        assert status == 0
        assert ("quantised weights are decoded" in err) == named


def test_dense_format_multiplies_codes_back(small: Settings, tmp_path: Path) -> None:
    kept = compress(recipe_from(small()))
    compress(recipe_from(small(output=str(tmp_path / "out"), format="dense")))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain), logits(kept.model.float()), atol=1e-3, rtol=1e-3)


def test_transposed_layers_with_biases_are_quantised(small: Settings, tiny: Path, tmp_path: Path) -> None:
    """GPT-2 keeps W as [n, m] and adds biases."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2048, n_embd=36, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder, output = tmp_path / "gpt2", tmp_path / "out"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    method = {**CALDERA, "q_bits": 4, "rank": 30, "lr_bits": 16}
    result = compress(recipe_from(small(model=str(folder), output=str(output), method=method)))
    assert torch.equal(logits(load_model(str(output)).model), logits(result.model.float()))
    far = (logits(result.model) - logits(model)).norm() / logits(model).norm()
    assert far < 0.05


def test_the_error_of_every_iteration_is_reported(small: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(recipe_from(small(output=str(output))))
    sites = json.loads((output / REPORT_FILE).read_text())["sites"]
    for facts in sites.values():
        assert len(facts["errors"]) == 3
        assert facts["error"] == min(facts["errors"]) == facts["errors"][facts["iteration_kept"] - 1]
        assert facts["damping"] == 0.01
    assert (output / "iterations.svg").stat().st_size > 1000
    card = (output / "README.md").read_text()
    assert "bits a linear weight" in card
    assert "rankwise_cache_dense" in card


# --- Budgets of bits.


def site(m: int, n: int, name: str = "a") -> Site:
    return Site(name, name, 0, m, n, False, False, name)


def problem_of(method: Caldera | Quantize, sites: list[Site], budget: Budget) -> Problem:
    form = method.form(budget, 16)
    candidates = {s.name: method.candidates((s.m, s.n), form, budget.rank_multiple, looks=False) for s in sites}
    return Problem(sites, candidates, form, Allowance(budget, sum(s.parameters for s in sites), 16))


def test_bits_of_the_paper() -> None:
    """Llama-2-7B with 2-bit Q and 4-bit factors: ranks 64, 128, 256 are published as 2.1, 2.2, 2.4 bits."""
    sites = [site(4096, 4096)] * 4 + [site(11008, 4096)] * 2 + [site(4096, 11008)]
    form = Form()
    whole = sum(s.parameters for s in sites)
    for rank, published in ((64, 2.1), (128, 2.2), (256, 2.4)):
        bits = sum(form.bits((s.m, s.n), Cut(rank, 2, 4)) for s in sites) / whole
        assert bits == pytest.approx(published, abs=0.05)
    assert form.bits((4096, 4096), Cut(0, 2)) == 2 * 4096**2 + 16 * 4096 + 2 * 4096


@pytest.mark.parametrize("bits", [2.2, 2.9, 3.7, 4.4, 6.0])
def test_a_budget_of_bits_is_filled_and_never_exceeded(bits: float) -> None:
    sites = [site(256, 256, "q"), site(688, 256, "up"), site(256, 688, "down")]
    problem = problem_of(Caldera(lr_bits=4), sites, Budget(bits=bits, rank_multiple=1))
    spent = problem.spent(fill(problem, {s.name: 1.0 for s in sites}))
    step = max(problem.form.rank_bits((s.m, s.n), 4) for s in sites)
    assert problem.allowance.bits - step < spent <= problem.allowance.bits
    alone = problem_of(Quantize(), sites, Budget(bits=bits))
    only = fill(alone, {s.name: 1.0 for s in sites})
    assert all(cut == Cut(0, cut.q_bits) for cut in only.values())
    assert alone.spent(only) <= alone.allowance.bits


def test_bits_that_nothing_fits_are_refused_before_anything_slow(small: Settings) -> None:
    with pytest.raises(BudgetError, match=r"Nothing fits 1\.5 bits a weight") as problem:
        compress(recipe_from(small(method="caldera", budget={"bits": 1.5})))
    assert "raise --bits" in str(problem.value)


@pytest.mark.parametrize("method", ["caldera", "quantize"])
def test_every_allocation_meets_a_budget_of_bits(method: str, small: Settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**CALDERA, "q_bits": None, "rank": None, "outer": 1} if method == "caldera" else {"name": "quantize"}
    manual = {"name": "manual", "roles": dict.fromkeys(("q", "k", "o", "gate", "up", "down"), 0.5) | {"v": 1.0}}
    plans = {}
    for allocation in ("uniform", manual, "spectral", {"name": "bayesian", "space": "rolesx1", "trials": 4}):
        values = small(method=settings, allocation=allocation, budget=BITS, validation={"sequences": 8})
        plan = compress(recipe_from(values), run_directory=run).plan
        assert 3.5 < plan.bits_a_weight <= 4.0
        plans[plan.allocation] = plan
    assert len(set(plans["spectral"].cuts.values())) > 1
    twice = {role: plans["manual"].groups[role] for role in ("v", "q")}
    assert twice["v"] > 1.1 * twice["q"]
    # What a budget chooses without being told how is the plan by estimated loss.
    assert compress(recipe_from(small(method=settings, budget=BITS)), run_directory=run).plan == plans["spectral"]


@pytest.mark.parametrize(
    ("method", "budget", "most"),
    [("bolaco", {"bits": 12}, 12), ("caldera", {"keep": 0.125}, 4), ("quantize", {"keep": 0.125}, 4)],
)
def test_bits_and_kept_fractions_mean_the_same_to_every_method(
    method: str, budget: dict[str, Any], most: float, small: Settings
) -> None:
    """The tiny model has 32 bits a number."""
    settings = {"name": method, "outer": 1} if method == "caldera" else method
    plan = compress(recipe_from(small(method=settings, budget={**budget, "rank_multiple": 1}))).plan
    assert most - 0.5 < plan.bits_a_weight <= most
    assert plan.kept == pytest.approx(plan.bits_a_weight / 32)


def test_a_plan_of_bits_is_taken_over_and_scaled(small: Settings, tmp_path: Path) -> None:
    method = {**CALDERA, "q_bits": None, "rank": None, "outer": 1}
    first = compress(recipe_from(small(method=method, budget=BITS)), run_directory=tmp_path / "run")
    file = tmp_path / "plan.json"
    file.write_text(first.plan.model_dump_json())
    assert Plan.load(file) == first.plan
    again = {"allocation": {"name": "plan", "file": str(file)}, "method": method}
    same = compress(recipe_from(small(**again, budget=BITS)), run_directory=tmp_path / "run")
    assert same.plan.cuts == first.plan.cuts
    assert torch.equal(logits(same.model), logits(first.model))
    notes = Reporter(show=False)
    smaller = compress(recipe_from(small(**again, budget={**BITS, "bits": 3.5})), reporter=notes)
    assert 3.0 < smaller.plan.bits_a_weight <= 3.5
    assert any("scaled to 3.5 bits" in note for note in notes.notes)
    with pytest.raises(BudgetError, match="made with the method caldera"):
        compress(recipe_from(small(allocation=again["allocation"], method="bolaco", budget={"keep": 0.5})))


def test_a_cut_is_another_when_its_bits_are() -> None:
    assert Cut(8, 2, 4) != Cut(8, 3, 4)
    assert Cut(8, 2, 4) != Cut(8, 2, 3)
    assert Cut(8, 2, 4) == Cut(8, 2, 4)
    assert Cut(8, 2, 4) != Cut(8)
    assert len({Cut(8, 2, 4), Cut(8, 3, 4), Cut(8, 2, 4)}) == 2


def test_a_search_sees_the_bits_of_its_plans(small: Settings) -> None:
    """Ranks are zero in every plan of Q alone; what differs is bits."""
    search = {"name": "bayesian", "space": "rolesx1", "trials": 4}
    values = small(method="quantize", allocation=search, budget={"bits": 3.8}, validation={"sequences": 8})
    result = compress(recipe_from({**values, "output": None}))
    assert result.report.search.trials == 4
    assert result.plan.objective is not None
    uniform = compress(recipe_from(small(method="quantize", allocation="uniform", budget={"bits": 3.8})))
    assert {cut.rank for plan in (uniform.plan, result.plan) for cut in plan.cuts.values()} == {0}
    assert uniform.plan.cuts != result.plan.cuts


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda plan: plan["cuts"][NAME].update(lr_bits=None), "needs the bits of its entries"),
        (lambda plan: plan.pop("form"), "form"),
        (lambda plan: plan["cuts"][NAME].update(rank=33), "does not lie in 0..32"),
        (lambda plan: plan["cuts"][NAME].update(rank=-1), "the rank -1 is negative"),
        (lambda plan: plan["cuts"][NAME].update(rank=None), "has neither Q nor bits"),
        (lambda plan: plan["cuts"][NAME].update(rank=0, q_bits=0), "without Q needs a rank"),
        (lambda plan: plan["cuts"][NAME].update(q_bits=7), "e8p has no 7 bits"),
        (lambda plan: plan["cuts"][NAME].update(lr_bits=9), "uniform has no 9 bits"),
        (lambda plan: plan["cuts"].pop(NAME), "a shape without a cut"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(
    damage: Callable[[dict[str, Any]], Any], says: str, quantised: Path
) -> None:
    plan = json.loads((quantised / "plan.json").read_text())
    damage(plan)
    (quantised / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BudgetError, match="cannot be read") as problem:
        Plan.load(quantised / "plan.json")
    assert says in str(problem.value)


def as_first_format(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan of CALDERA as the first format held it: ranks and bits apart, and bits of L R for all sites."""
    cuts, form = plan["cuts"], plan["form"]
    kept = {name: value for name, value in plan.items() if name not in ("format", "size", "cuts", "form")}
    return {
        **kept,
        "format": "rankwise-plan/1",
        "storage": "two_factor",
        "ranks": {name: cut["rank"] for name, cut in cuts.items()},
        "q_bits": {name: cut["q_bits"] for name, cut in cuts.items() if cut["rank"] is not None},
        "form": {
            **{name: form[name] for name in ("codebook", "group", "row_scales", "hadamard", "trained_signs")},
            "lr_bits": 4,
            "lr_codebook": "e8p",
            "full_rank": form["full_rank"],
        },
        "dense_bits": form["number_bits"],
    }


@pytest.mark.parametrize("dense", [False, True])
def test_a_plan_of_the_first_format_says_the_same(dense: bool, quantised: Path) -> None:
    file = quantised / "plan.json"
    values = json.loads(file.read_text())
    if dense:
        values["cuts"][NAME] = {"rank": None, "q_bits": 0, "lr_bits": None}
    values["cuts"]["model.layers.0.mlp.down_proj"] = {"rank": 0, "q_bits": 3, "lr_bits": None}
    wanted = Plan.model_validate(values)
    file.write_text(json.dumps(as_first_format(values)))
    found = Plan.load(file)
    assert found.cuts == wanted.cuts
    assert found.shapes == wanted.shapes
    assert {name: found.site_bits(name) for name in found.cuts} == {n: wanted.site_bits(n) for n in wanted.cuts}
    assert found.kept == wanted.kept
    assert found.format == "rankwise-plan/2"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda plan: plan["q_bits"].popitem(), "without bits of Q"),
        (lambda plan: plan.pop("form"), "not the form"),
        (lambda plan: plan["ranks"].update({NAME: 33}), "does not lie in 0..32"),
        (lambda plan: plan["ranks"].update({NAME: None}), "bits without a rank"),
        (lambda plan: plan["q_bits"].update({NAME: 7}), "e8p has no 7 bits"),
        (lambda plan: (plan["ranks"].pop(NAME), plan["q_bits"].pop(NAME)), "a shape without a cut"),
        (lambda plan: plan.pop("ranks"), "ranks"),
        (lambda plan: plan.update(ranks=3), "ranks"),
        (lambda plan: plan.update(format="rankwise-plan/9"), "another version"),
    ],
)
def test_plans_of_the_first_format_that_contradict_themselves_are_refused(
    damage: Callable[[dict[str, Any]], Any], says: str, quantised: Path
) -> None:
    plan = as_first_format(json.loads((quantised / "plan.json").read_text()))
    damage(plan)
    (quantised / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BudgetError, match="cannot be read") as problem:
        Plan.load(quantised / "plan.json")
    assert says in str(problem.value)


def test_a_plan_and_other_bits_beside_it_are_refused(quantised: Path, small: Settings) -> None:
    taken = {"name": "plan", "file": str(quantised / "plan.json")}
    with pytest.raises(BudgetError, match="bits and ranks given beside the plan"):
        compress(recipe_from(small(allocation=taken, method={**CALDERA, "q_bits": 3})))


def test_other_codes_are_other_weights(small: Settings, tmp_path: Path) -> None:
    """A training may not go on with another quantisation of the same model."""
    marks = set()
    for seed in (0, 1):
        compress(recipe_from(small(output=str(tmp_path / "out"), seed=seed)))
        loaded = load_model(str(tmp_path / "out"))
        marks.add(fingerprint(loaded.model, loaded.stored_dtypes))
    assert len(marks) == 2


def test_a_damaged_scale_is_named(quantised: Path) -> None:
    tensors = load_file(quantised / "model.safetensors")
    tensors[f"{NAME}.q.scale"][0] = float("nan")
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match="A scale holds NaN") as problem:
        load_model(str(quantised))
    assert NAME in str(problem.value)


def test_a_site_that_stays_dense_counts_what_its_file_has(small: Settings, tmp_path: Path) -> None:
    roles = dict.fromkeys(("q", "k", "o", "gate", "up", "down"), 0.5) | {"v": "dense"}
    method = {**CALDERA, "q_bits": None, "rank": None, "outer": 1}
    allocation = {"name": "manual", "roles": roles}
    values = small(method=method, allocation=allocation, budget={"bits": 6, "rank_multiple": 1})
    result = compress(recipe_from({**values, "output": str(tmp_path / "out")}))
    name = "model.layers.0.self_attn.v_proj"
    assert result.plan.cuts[name] == DENSE
    assert result.plan.site_bits(name) == 8 * site_tensors(tmp_path / "out", name)["weight"].nbytes
    assert result.plan.bits_a_weight <= 6


def test_fewer_ranks_than_are_numbers_cannot_be_trained(small: Settings, text: Path, tmp_path: Path) -> None:
    compress(recipe_from(small(output=str(tmp_path / "small"), method={**CALDERA, "lr_bits": 16})))
    with pytest.raises(RecipeError, match="16-bit numbers") as problem:
        tune(tmp_path / "small", text, trained_rank=2)
    assert "trained_rank" in str(problem.value)


def test_no_loss_gradient_means_no_rank(small: Settings, tiny: Path) -> None:
    """An up projection of zeros lets no gradient through to the gate."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    model.save_pretrained(tiny)
    method = {**CALDERA, "q_bits": None, "rank": None, "outer": 1}
    plan = compress(recipe_from(small(method=method, budget=BITS))).plan
    assert plan.cuts["model.layers.1.mlp.gate_proj"] == Cut(0, 2)


@pytest.mark.long
def test_after_a_kill_among_the_codes_the_same_command_ends_with_the_same_bytes(
    small: Settings, tmp_path: Path
) -> None:
    values = small(output=str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    compress(recipe_from({**values, "output": str(tmp_path / "whole")}), run_directory=tmp_path / "other")
    run = tmp_path / "run"
    arguments = ["save_factors", "5", str(tmp_path / "recipe.yaml"), str(run)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(next(run.glob("fits-*")).glob("*.safetensors"))) == 5
    compress(recipe_from(values), run_directory=run)
    for name in ("model.safetensors", "plan.json", "modeling_rankwise.py"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- Training of L and R.


def tune(quantised: Path, text: Path, **settings: Any) -> tuple[Report, Path]:
    output = quantised.with_name("tuned")
    training = LowRankFactors(epochs=1, lr=0.01, batch_size=8, **settings)
    wanted = FineTune(
        model=str(quantised), data=f"text:{text}", output=str(output), method="lowrank", settings=training, length=32
    )
    return finetune(wanted), output


@pytest.mark.parametrize(
    ("training", "full"),
    [({}, 8), ({"loss": "lm"}, 8), ({"trained_rank": 3}, 3), ({"requantize": True}, 0), ({"signs": True}, 8),
     ({"trained_rank": 3, "requantize": True}, 0)],
)  # fmt: skip
def test_training_lowers_the_loss_and_leaves_q_alone(
    training: dict[str, Any], full: int, quantised: Path, text: Path
) -> None:
    report, output = tune(quantised, text, **training)
    step = report.finetune[-1]
    assert step.accepted
    assert step.loss_after < step.loss_before
    before, after = site_tensors(quantised, NAME), site_tensors(output, NAME)
    assert torch.equal(before["q.codes"], after["q.codes"])
    assert torch.equal(before["q.scale"], after["q.scale"])
    plan = Plan.load(output / "plan.json")
    assert (plan.form.full_rank, plan.form.trained_signs) == (full, training.get("signs", False))
    for name in plan.shapes:
        assert 8 * sum(t.nbytes for t in site_tensors(output, name).values()) == plan.site_bits(name)
        assert report.sites[name].bits == plan.site_bits(name)
        assert report.sites[name].cut == plan.cuts[name]
    assert report.bits.got == plan.bits_a_weight
    kept = training.get("trained_rank", 8)
    if kept < 8:
        start = 0 if full else kept
        assert torch.equal(after["packed_left.codes"][start:], before["packed_left.codes"][kept:])
        assert torch.equal(after["packed_right.scale"][start:], before["packed_right.scale"][kept:])
    ours = logits(load_model(str(output)).model)
    elsewhere = AutoModelForCausalLM.from_pretrained(
        output, trust_remote_code=True, dtype=torch.float32, rankwise_cache_dense=False
    )
    torch.testing.assert_close(logits(elsewhere), ours, atol=1e-6, rtol=1e-6)


def test_a_tuned_checkpoint_can_be_tuned_again(quantised: Path, text: Path) -> None:
    tune(quantised, text, trained_rank=3)
    report, output = tune(quantised.with_name("tuned"), text, trained_rank=5)
    plan = Plan.load(output / "plan.json")
    assert plan.form.full_rank == 5
    assert len(report.finetune) == 2


def test_a_training_that_harms_is_undone(quantised: Path, text: Path) -> None:
    output = quantised.with_name("tuned")
    training = LowRankFactors(epochs=1, lr=1, batch_size=8)
    report = finetune(
        FineTune(model=str(quantised), data=f"text:{text}", output=str(output), method="lowrank", settings=training,
                 length=32)
    )  # fmt: skip
    assert not report.finetune[-1].accepted
    assert (output / "model.safetensors").read_bytes() == (quantised / "model.safetensors").read_bytes()


def test_the_wrong_kind_of_training_is_refused(quantised: Path, settings: Settings, text: Path, tmp_path: Path) -> None:
    wanted = {"data": f"text:{text}", "output": str(tmp_path / "o"), "length": 32}
    with pytest.raises(RecipeError, match="is quantised") as problem:
        finetune(FineTune(model=str(quantised), method="full-factors", **wanted))
    assert "--method lowrank" in str(problem.value)
    compress(recipe_from(settings(output=str(tmp_path / "factors"))))
    with pytest.raises(RecipeError, match="is not quantised"):
        finetune(FineTune(model=str(tmp_path / "factors"), method="lowrank", **wanted))
    values = settings(output=str(tmp_path / "q"), method={"name": "quantize", "q_bits": 2}, budget={"keep": None})
    compress(recipe_from(values))
    with pytest.raises(RecipeError, match="nothing to train"):
        finetune(FineTune(model=str(tmp_path / "q"), method="lowrank", **wanted))


# --- Bad input.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {**CALDERA, "q_bits": 5}}, "e8p has no 5 bits"),
        ({"method": {**CALDERA, "q_bits": 1, "codebook": "uniform"}}, "uniform has no 1 bits"),
        ({"method": {**CALDERA, "lr_bits": 12}}, "12 bits"),
        ({"method": {**CALDERA, "group": 12}}, "multiple of 8"),
        ({"method": {**CALDERA, "q_bits": 0, "rank": 0}}, "there has to be a rank"),
        ({"method": CALDERA, "budget": {"keep": 0.5}}, "a size is given beside q_bits and rank"),
        ({"method": CALDERA, "budget": {"bits": 3}}, "a size is given beside q_bits and rank"),
        ({"method": CALDERA, "budget": {"size": "90KB"}}, "a size is given beside q_bits and rank"),
        ({"method": CALDERA, "budget": {"storage": "two_factor"}}, "stores codes"),
        ({"method": "caldera"}, "needs q_bits and rank"),
        ({"method": "quantize"}, "needs q_bits"),
        ({"method": CALDERA, "allocation": "spectral"}, "give budget.bits"),
        ({"method": CALDERA, "repair": {"steps": "refit"}}, "finetune --method lowrank"),
        ({"method": "caldera", "budget": {"bits": 3, "keep": 0.5}}, "give one of them"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], says: str, small: Settings) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe_from(small(**changes))


def test_the_command_line_takes_bits(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    common = ["compress", tiny, "--calibration", f"text:{text}", "--sequences", 16, "--length", 32]
    common += ["-o", tmp_path / "out", "--method", "caldera"]
    failed(rankwise(*common, "--q-bits", 2, "--rank", 20), "above min(m, n) = 16", "[16, 32]", "lower --rank")
    failed(rankwise(*common, "--q-bits", 2, "--rank", 4, "--lr-bits", 5, "--codebook", "e9p"), "e8p")
    failed(rankwise(*common, "--q-bits", 2), "needs rank")
    common += ["--set", "method.outer=2", "--set", "method.inner=2"]
    status, out, err = rankwise(*common, "--q-bits", 2, "--rank", 4, "--lr-bits", 4)
    assert status == 0, err
    assert "bits a linear weight" in out
    status, out, err = rankwise("evaluate", tmp_path / "out", "--text", f"text:{text}", "--length", 32, "--dense-cache")
    assert status == 0, err
    assert "perplexity" in out
    status, out, err = rankwise("plan", "show", tmp_path / "out" / "plan.json")
    assert status == 0, err
    assert "bits a weight" in out
    status, out, err = rankwise("sensitivity", tiny, "-o", tmp_path / "s", "--method", "caldera")
    failed((status, out, err), "caldera")


def test_a_site_that_is_never_activated_is_named_and_falls_back(small: Settings, tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    model.save_pretrained(tiny)
    reporter = Reporter(show=False)
    result = compress(recipe_from(small(output=str(tmp_path / "out"))), reporter=reporter)
    named = [note for note in reporter.notes if "are zero on the calibration text" in note]
    assert {note.partition(":")[0] for note in named} == {f"model.layers.1.mlp.{x}_proj" for x in ("up", "down")}
    assert torch.isfinite(logits(result.model)).all()
    layer = result.model.model.layers[1].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.dense_weight().abs().max() < 1e-20


def test_inputs_that_are_not_finite_name_their_layer(small: Settings, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(1e30)
        model.model.layers[0].self_attn.q_proj.weight.fill_(1e30)
    model.save_pretrained(tiny)
    with pytest.raises(NotFiniteError, match="layers"):
        compress(recipe_from(small()))
