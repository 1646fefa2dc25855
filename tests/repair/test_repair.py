"""Repair: closed forms against their definitions, merging, stages that are judged, undone, killed and continued."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import given_logits, tiny_llama
from rankwise import compress
from rankwise.data import Examples
from rankwise.errors import NotFiniteError, RankwiseError, RecipeError
from rankwise.factors import Factors
from rankwise.layers import LowRankLinear, PivotedLinear, kind_of, substitute
from rankwise.linalg import OutputMetric
from rankwise.models import BlockRunner, Logits, Original, Site, find_sites
from rankwise.recipes import recipe_from
from rankwise.repair import (
    Blocks,
    FullFactors,
    Lora,
    Refit,
    Subspace,
    block_parameters,
    refit_block,
    steps_of,
    train,
    train_block,
    trainable,
)
from rankwise.repair.refit import refit_both, refit_left
from rankwise.repair.training import _micro, mean_loss, token_losses
from rankwise.reports import closing_table

Settings = Callable[..., dict[str, Any]]
stage_module: Any = importlib.import_module("rankwise.stages.repairing")

IDS = torch.randint(0, 2048, (6, 24), generator=torch.Generator().manual_seed(3))


def factored_llama(share: float = 0.4, **changes: Any) -> tuple[Any, list[Site], Original]:
    """A tiny model cut to low rank, with what it was before."""
    model = tiny_llama(**changes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = find_sites(model)
    original = Original.of(model, sites)
    for site in sites:
        u, s, v = torch.linalg.svd(site.weight(model).double(), full_matrices=False)
        rank = max(1, int(share * len(s)))
        factors = Factors(u[:, :rank] * s[:rank], v[:rank], torch.zeros(site.m))
        substitute(model, site.name, factors, "two_factor", torch.float32)
    return model, sites, original


def factors_of(layer: Any) -> Factors:
    return kind_of(layer).factors(layer)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def moments(n: int, tokens: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x', E[x x'^T] and E[x' x'^T] of random inputs."""
    x = torch.randn(tokens, n).double()
    new = x + noise * torch.randn(tokens, n).double()
    return x, new, x.T @ new / tokens, new.T @ new / tokens


@given(m=st.integers(1, 9), n=st.integers(1, 9), noise=st.floats(0, 1), data=st.data())
def test_the_refitted_left_factor_is_the_least_squares_one(m: int, n: int, noise: float, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    torch.manual_seed(100 * m + n)
    weight = torch.randn(m, n).double()
    old = Factors(torch.randn(m, rank).double(), torch.randn(rank, n).double())
    x, new, cross, moment = moments(n, 60, noise)
    found = refit_left(weight, old, cross, moment, 1e-12)
    expected = torch.linalg.lstsq(new @ old.right.T, x @ weight.T).solution.T
    torch.testing.assert_close(found.left, expected, rtol=1e-5, atol=1e-6)
    # A large ridge leaves what was there.
    held = refit_left(weight, old, cross, moment, 1e9)
    torch.testing.assert_close(held.left, old.left, rtol=1e-5, atol=1e-5)


@given(m=st.integers(2, 8), n=st.integers(2, 8), noise=st.floats(0, 1), weighed=st.booleans(), data=st.data())
def test_no_map_of_its_rank_beats_the_anchored_refit(
    m: int, n: int, noise: float, weighed: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    torch.manual_seed(100 * m + n)
    weight = torch.randn(m, n).double()
    x, new, cross, moment = moments(n, 60, noise)
    spread = torch.randn(m, m).double()
    curvature = spread @ spread.T + 0.1 * torch.eye(m)
    metric = OutputMetric.of(curvature.unsqueeze(0), 0.0) if weighed else None
    found = refit_both(weight, rank, cross, moment, 1e-12, metric)

    def error(candidate: Tensor) -> float:
        wrong = x @ weight.T - new @ candidate.T
        return float((wrong @ curvature * wrong).mean() if weighed else wrong.square().mean())

    best = error(found.reconstruct())
    other = Factors(torch.randn(m, rank).double(), torch.randn(rank, n).double())
    assert best <= error(refit_left(weight, other, cross, moment, 1e-12).reconstruct()) + 1e-9
    for scale in (1e-3, 1e-2):
        nudged = Factors(
            found.left + scale * torch.randn_like(found.left), found.right + scale * torch.randn_like(found.right)
        )
        assert best <= error(nudged.reconstruct()) + 1e-9
    if noise == 0:
        root = torch.linalg.cholesky(moment + 1e-12 * torch.eye(n))
        s = torch.linalg.svdvals((weight if metric is None else metric.weigh(weight)) @ root)
        least = float(s[rank:].square().sum())
        assert abs(best * m - least) < 1e-6 * max(1.0, float(s.square().sum()))


@pytest.mark.parametrize("factors", ["left", "both"])
def test_a_refit_brings_a_block_nearer_to_the_original(factors: Any) -> None:
    model, sites, original = factored_llama()
    runner = BlockRunner(model, IDS, 4)
    inside = [site for site in sites if site.block == 0]
    embedded = runner.embed(torch.empty(runner.shape))
    target = torch.empty_like(embedded)
    with original.in_place(model, inside):
        runner.forward_all(0, embedded, target)

    def error() -> float:
        found = torch.empty_like(embedded)
        runner.forward_all(0, embedded, found)
        return float((found - target).square().mean())

    before = error()
    refit_block(runner, 0, inside, original, embedded, embedded, Refit(factors=factors, batch_size=4))
    assert error() < 0.8 * before


def test_blocks_run_one_by_one_give_what_the_model_gives() -> None:
    model, _, original = factored_llama(num_hidden_layers=3)
    runner = BlockRunner(model, IDS, 4)
    runner.check()
    hidden = runner.embed(torch.empty(runner.shape))
    for index in range(3):
        runner.forward_all(index, hidden, hidden)
    with torch.no_grad():
        found = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    dense = logits(tiny_llama(num_hidden_layers=3))
    with original.in_place(model):
        torch.testing.assert_close(logits(model), dense)
    assert not torch.allclose(logits(model), dense, atol=1e-2)


@pytest.mark.parametrize("norms", [False, True])
def test_a_block_learns_its_originals_output_and_nothing_else_changes(norms: bool) -> None:
    model, sites, original = factored_llama()
    runner = BlockRunner(model, IDS, 4)
    embedded = runner.embed(torch.empty(runner.shape))
    target, ahead = torch.empty_like(embedded), torch.empty_like(embedded)
    with original.in_place(model):
        runner.forward_all(0, embedded, target)
        runner.forward_all(1, target, ahead)
    parameters = block_parameters(model, 0, sites, norms)
    assert any("layernorm" in name for name in parameters) == norms
    others = {n: p.clone() for n, p in model.named_parameters() if n not in parameters}
    following = [site for site in sites if site.block == 1]
    losses = train_block(
        runner,
        0,
        parameters,
        embedded,
        target,
        Blocks(epochs=20, batch_size=3, norms=norms, lookahead=0.5),
        seed=0,
        ahead=(lambda: original.in_place(model, following), ahead),
    )
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for name, value in others.items():
        assert torch.equal(model.get_parameter(name), value), name
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("directions", [2, 256])
def test_the_fixed_subspace_merges_without_raising_the_rank(directions: int) -> None:
    model, sites, _ = factored_llama()
    before = logits(model)
    ranks = {site.name: site.module(model).right.out_features for site in sites}
    training = Subspace(directions=directions)
    parameters = training.attach(model, sites, 0)
    torch.testing.assert_close(logits(model), before)
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    unmerged = logits(model)
    assert not torch.allclose(unmerged, before, atol=1e-3)
    assert training.fold_in(model, sites, {}) == {}
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    assert {site.name: site.module(model).right.out_features for site in sites} == ranks
    assert all(isinstance(site.module(model), LowRankLinear) for site in sites)


@pytest.mark.parametrize("merge", ["grow", "truncate"])
def test_adapters_merge_honestly(merge: Any) -> None:
    model, sites, _ = factored_llama()
    before = logits(model)
    ranks = {site.name: site.module(model).right.out_features for site in sites}
    state = torch.random.get_rng_state()
    training = Lora(rank=3, merge=merge)
    parameters = training.attach(model, sites, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(parameters) == 2 * len(sites)
    torch.testing.assert_close(logits(model), before)
    for parameter in parameters.values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    wholes = {site.name: site.module(model) for site in sites}
    products = {
        name: factors_of(module.base_layer).reconstruct()
        + module.scaling["rankwise"]
        * (module.lora_B["rankwise"].weight @ module.lora_A["rankwise"].weight).detach().double()
        for name, module in wholes.items()
    }
    limits = {site.name: ranks[site.name] + 3 - (site.role == "q") for site in sites}
    lost = training.fold_in(model, sites, limits)["norm_lost_in_merging"]
    now = {site.name: site.module(model).right.out_features for site in sites}
    limited = [site for site in sites if merge == "truncate" or site.role == "q"]
    assert now == {s.name: ranks[s.name] + (0 if merge == "truncate" else 2 if s.role == "q" else 3) for s in sites}
    for site in sites:
        product = products[site.name]
        merged = factors_of(site.module(model)).reconstruct()
        if site not in limited:
            torch.testing.assert_close(merged, product, rtol=1e-3, atol=1e-4)
            assert lost[site.name] == 0
            continue
        s = torch.linalg.svdvals(product).square()
        share = float(s[now[site.name] :].sum() / s.sum())
        assert lost[site.name] == pytest.approx(share, rel=1e-4)
        assert float((merged - product).square().sum() / s.sum()) == pytest.approx(share, rel=1e-2)


def examples(count: int = 12) -> Examples:
    rows = list(torch.randint(0, 2048, (count, 16), generator=torch.Generator().manual_seed(5)))
    return Examples(rows, rows, "random")


def train_tiny(folder: Path, settings: FullFactors, stop_at: int | None = None) -> tuple[Any, list[dict[str, float]]]:
    model, sites, original = factored_llama()

    def teacher(ids: Tensor, mask: Tensor) -> Logits:
        with original.in_place(model):
            return given_logits(model(input_ids=ids, attention_mask=mask).logits)

    def told(step: int, steps: int, loss: float) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    parameters = trainable(model, sites, norms=True)
    history = train(model, parameters, examples(), settings, teacher=teacher, folder=folder, seed=1, step_done=told)
    return model, history


@pytest.mark.parametrize("loss", ["kl", "lm"])
def test_a_training_that_was_killed_goes_on_as_if_it_was_not(loss: Any, tmp_path: Path) -> None:
    settings = FullFactors(epochs=4, batch_size=4, micro_batch=2, loss=loss, save_every=3)
    whole, history = train_tiny(tmp_path / "whole", settings)
    assert [row["step"] for row in history] == list(range(1, 13))
    assert history[-1]["loss"] < history[0]["loss"]
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "killed", settings, stop_at=8)
    again, continued = train_tiny(tmp_path / "killed", settings)
    assert len(continued) == 12
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    one, _ = train_tiny(tmp_path / "a", FullFactors(epochs=1, batch_size=12, micro_batch=12))
    four, _ = train_tiny(tmp_path / "b", FullFactors(epochs=1, batch_size=12, micro_batch=3))
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(four.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_padding_and_prompts_are_not_learned_from() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, 3, -100, -100], [-100, -100, 4, 5, 6]])
    found = token_losses(given_logits(outputs), labels, None).float()
    logs = outputs.log_softmax(-1)
    expected = -(logs[0, 0, 2] + logs[0, 1, 3] + logs[1, 1, 4] + logs[1, 2, 5] + logs[1, 3, 6])
    torch.testing.assert_close(found, expected)
    assert float(token_losses(given_logits(outputs), labels, given_logits(outputs))) == pytest.approx(0, abs=1e-5)
    assert float(token_losses(given_logits(outputs), labels, given_logits(torch.randn(2, 5, 7)))) > 0


def test_the_mean_loss_of_a_model_counts_every_token_once() -> None:
    model, _, _ = factored_llama()
    rows = examples(5)
    found = mean_loss(model, rows, FullFactors(loss="lm", micro_batch=2), None)
    stacked = torch.stack(rows.ids)
    with torch.no_grad():
        logs = model(input_ids=stacked).logits[:, :-1].log_softmax(-1)
    expected = -logs.gather(-1, stacked[:, 1:, None]).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    model, sites, _ = factored_llama()
    parameters = trainable(model, sites, norms=False)
    next(iter(parameters.values())).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        train(model, parameters, examples(), FullFactors(loss="lm"), teacher=None, folder=tmp_path, seed=0)


@pytest.fixture
def repairing(settings: Settings) -> Settings:
    """A recipe with repair on the tiny model."""

    def make(steps: str, **changes: Any) -> dict[str, Any]:
        repair = {
            "steps": steps,
            "blocks": {"epochs": 2, "batch_size": 8},
            "factors": {"epochs": 1, "batch_size": 8},
            **changes.pop("repair", {}),
        }
        budget = {"keep": 0.6, "rank_multiple": 1, "storage": "pivoted"}
        validation = {"sequences": 8, "length": 32}
        return settings(
            **{"method": "two_sided", "budget": budget, "validation": validation, "repair": repair, **changes}
        )

    return make


def test_every_repair_in_one_run(repairing: Settings, tmp_path: Path) -> None:
    values = repairing("factors,refit, blocks,subspace", output=str(tmp_path / "out"))
    result = compress(recipe_from(values), run_directory=tmp_path / "run")
    steps = result.report.repair
    assert [step.step for step in steps] == ["refit", "blocks", "subspace", "factors"]
    for step in steps:
        assert step.objective_after <= step.objective_before or not step.accepted
    for earlier, later in pairwise(steps):
        reached = earlier.objective_after if earlier.accepted else earlier.objective_before
        assert later.objective_before == pytest.approx(reached, rel=1e-4)
    assert len(steps[-1].history) == 5
    assert (tmp_path / "out" / "repair.svg").exists()
    assert (tmp_path / "out" / "README.md").read_text().count("- repair `") == 4
    printed = Console(width=120, file=io.StringIO())
    printed.print(closing_table(result.report))
    assert "objective, blocks" in printed.file.getvalue()
    plain = compress(recipe_from({**values, "repair": {}, "output": None}), run_directory=tmp_path / "run")
    assert result.report.after == plain.report.after
    assert any(isinstance(m, PivotedLinear) for m in result.model.modules())
    # From finished stages: the same bytes.
    again = compress(recipe_from({**values, "output": str(tmp_path / "again")}), run_directory=tmp_path / "run")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.report.repair == steps


@pytest.mark.parametrize("steps", ["refit", "blocks"])
def test_a_killed_repair_goes_on_with_the_next_block(
    steps: str, repairing: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(recipe_from(repairing(steps)), run_directory=tmp_path / "whole")
    calls, judge = [], stage_module.judge_repair

    def stop(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(stage_module, "judge_repair", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe_from(repairing(steps)), run_directory=tmp_path / "killed")
    done = len(list((tmp_path / "killed").glob(f"repair-{steps}-*.partial/block-*.safetensors")))
    assert done == 1
    monkeypatch.setattr(stage_module, "judge_repair", judge)
    again = compress(recipe_from(repairing(steps)), run_directory=tmp_path / "killed")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("steps", ["refit", "blocks", "subspace", "factors", "lora"])
def test_a_repair_that_harms_is_undone_and_said(
    steps: str, repairing: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compress(recipe_from(repairing("")), run_directory=tmp_path / "run")
    rising = iter(range(1, 1000))
    monkeypatch.setattr(stage_module, "judge_repair", lambda *_: float(next(rising)))
    result = compress(recipe_from(repairing(steps)), run_directory=tmp_path / "run")
    assert not result.report.repair[0].accepted
    assert any("undone" in note for note in result.report.notes)
    ids = IDS[:1]
    torch.testing.assert_close(
        result.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_a_repair_to_nan_is_undone(repairing: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, float("nan"), float("nan")])
    monkeypatch.setattr(stage_module, "judge_repair", lambda *_: next(values))
    result = compress(recipe_from(repairing("blocks", output=str(tmp_path / "out"))), run_directory=tmp_path / "run")
    step = result.report.repair[0]
    assert "NaN" not in (tmp_path / "out" / "rankwise_report.json").read_text()
    assert step.objective_after == 2.0
    assert [(row.objective_after, row.accepted) for row in step.blocks] == [(None, False), (None, False)]


@pytest.mark.parametrize("steps", ["refit", "blocks"])
def test_activations_on_disk_change_nothing(steps: str, repairing: Settings, tmp_path: Path) -> None:
    small = {steps: {"memory": 1e-6}}
    on_disk = compress(recipe_from(repairing(steps, repair=small)), run_directory=tmp_path / "disk")
    in_memory = compress(recipe_from(repairing(steps, repair={steps: {}})), run_directory=tmp_path / "memory")
    for name, parameter in in_memory.model.named_parameters():
        assert torch.equal(on_disk.model.get_parameter(name), parameter), name
    assert not list((tmp_path / "disk").glob("repair-*/hidden"))


def test_blocks_that_cannot_run_alone_are_refused(repairing: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BlockRunner.run
    monkeypatch.setattr(BlockRunner, "run", lambda self, index, hidden: 2 * run(self, index, hidden))
    with pytest.raises(RankwiseError, match="run one by one, differ"):
        compress(recipe_from(repairing("blocks")))


@pytest.mark.parametrize(
    ("steps", "message"), [("refitt", "did you mean 'refit'"), ("refit,refit", "named twice"), ("dora", "no repair")]
)
def test_repairs_that_do_not_exist(steps: str, message: str, repairing: Settings) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from(repairing(steps))


def test_repair_learns_from_instructions(repairing: Settings, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [
        {"instruction": "list the object", "input": "", "output": "return the string " * (i % 3 + 1)} for i in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = repairing("subspace", repair={"data": f"alpaca:{file}", "output_only": True, "subspace": {"epochs": 1}})
    step = compress(recipe_from(values)).report.repair[0]
    assert step.examples.count == 8
    assert 8 <= step.examples.tokens < 8 * 24


def test_the_original_comes_back_even_when_something_breaks() -> None:
    model, _, original = factored_llama()
    before = logits(model)
    with pytest.raises(KeyError), original.in_place(model):
        raise KeyError
    assert torch.equal(logits(model), before)
    model.model.layers[0].input_layernorm.weight.data.mul_(3)
    changed = logits(model)
    with original.in_place(model):
        torch.testing.assert_close(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), changed)


@given(size=st.integers(1, 70), micro=st.integers(1, 20), count=st.integers(1, 200), epochs=st.integers(1, 5))
def test_epochs_are_passes_and_batches_have_the_size_asked_for(size: int, micro: int, count: int, epochs: int) -> None:
    settings = FullFactors(batch_size=size, micro_batch=micro, epochs=epochs)
    memory, accumulate = _micro(settings)
    assert memory <= micro
    assert memory * accumulate == size
    assert steps_of(settings, count) == epochs * math.ceil(math.ceil(count / memory) / accumulate)


@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_a_block_that_is_told_the_tokens_cannot_run_alone(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little comes of it in the end."""
    model, _, _ = factored_llama()
    layer = type(model.model.layers[0])
    whole, tokens = layer.forward, []

    def forward(self: Any, hidden: Tensor, *rest: Any, extra: Tensor | None = None, **named: Any) -> Any:
        return whole(self, hidden if extra is None else hidden + weight * extra, *rest, **named)

    def hand_over(_module: Any, positional: Any, named: Any) -> Any:
        return positional, {**named, "extra": model.model.embed_tokens(tokens[-1])} if "extra" not in named else named

    monkeypatch.setattr(layer, "forward", forward)
    model.model.register_forward_pre_hook(lambda _m, _a, named: tokens.append(named["input_ids"]), with_kwargs=True)
    # Registered by the model before any hook of the runner, as if the model itself passed it.
    for block in model.model.layers:
        block.register_forward_pre_hook(hand_over, with_kwargs=True)
    with pytest.raises(RankwiseError, match="is handed, beside hidden states, what depends on the tokens"):
        BlockRunner(model, IDS, 4).check()


def test_training_leaves_no_mark_and_counts_no_first_token(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config).eval().requires_grad_(False)
    sites = find_sites(model)
    for site in sites:
        u, s, v = torch.linalg.svd(site.weight(model).double(), full_matrices=False)
        substitute(model, site.name, Factors(u[:, :8] * s[:8], v[:8], site.bias(model)), "two_factor", torch.float32)
    rows = examples(4)
    settings = FullFactors(loss="lm", epochs=1, batch_size=4, lr=1e-6)
    expected = mean_loss(model, rows, settings, None)
    parameters = trainable(model, sites, norms=False)
    history = train(model, parameters, rows, settings, teacher=None, folder=tmp_path, seed=0)
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert model.config.use_cache is True


def test_a_model_that_computes_in_bfloat16_is_repaired_too(repairing: Settings) -> None:
    values = repairing("blocks,factors", precision="stored", repair={"blocks": {"norms": True}})
    result = compress(recipe_from(values))
    assert [step.step for step in result.report.repair] == ["blocks", "factors"]


def test_nothing_to_repair_is_said(repairing: Settings) -> None:
    budget = {"keep": 1, "rank_multiple": 1}
    result = compress(recipe_from(repairing("refit,blocks,subspace,factors", budget=budget)))
    assert result.report.repair == ()
    assert sum("nothing to do" in note for note in result.report.notes) == 4


def test_learning_from_the_text_that_judges_is_said(repairing: Settings, text: Path) -> None:
    result = compress(recipe_from(repairing("subspace", repair={"data": f"text:{text}", "length": 5000})))
    assert any("judged by" in note for note in result.report.notes)
    assert any("context of 64" in note for note in result.report.notes)


@pytest.mark.long
def test_a_refit_without_enough_text_says_what_to_do(repairing: Settings) -> None:
    calibration = {"source": "bundled", "sequences": 1, "length": 8}
    refit = {"factors": "both", "damping": 1e-18}
    with pytest.raises(NotFiniteError, match=r"refit\.damping"):
        compress(recipe_from(repairing("refit", method="svd", calibration=calibration, repair={"refit": refit})))
