"""Layers that keep several linear ones in one weight: taken apart, compressed, and put together again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from test_architectures import SMALL, tokens  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import ModelError
from rankwise.evaluation.operations import count_operations
from rankwise.layers.needs import FORMAT_VERSION, WITHOUT_GROUPS, unmet
from rankwise.models import GroupedLinear, find_sites, group, unfuse_experts
from rankwise.models.grouped import groups_of, ungroup
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.stages.routed import note_experts
from rankwise.statistics.pools import Reach

WITHOUT_HEADS = {key: value for key, value in SMALL.items() if key != "head_dim"}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    # Projections of experts, of the MLP and of attention, handed vectors sorted by expert: 4 experts, 4 weights.
    "JetMoe": ({**WITHOUT_HEADS, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, 16),
    # Groups of heads, each with an output projection of its own.
    "DeepseekV4": (
        {
            **SMALL,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "qk_rope_head_dim": 8,
            "partial_rotary_factor": 1.0,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "layer_types": ["heavily_compressed_attention"] * 2,
        },
        2,
    ),
}
IDENTIFIERS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**CASES[name][0])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDENTIFIERS, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_every_group_becomes_a_plain_layer_and_goes_back(name: str) -> None:
    model, (_, per_block) = build(name), CASES[name]
    before, expected = {key: p.clone() for key, p in model.named_parameters()}, logits(model)
    paths = [path for path, module in model.named_modules() if groups_of(module)]
    assert unfuse_experts(model).left == ()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    sites = [site for site in find_sites(model) if site.name.rpartition(".")[0] in paths]
    assert len(sites) == 2 * per_block
    assert not any("router" in site.name for site in find_sites(model))
    for path in paths:
        here = [site for site in sites if site.name.rpartition(".")[0] == path]
        assert {site.role for site in here} == {path.rpartition(".")[2]}
        # Experts of one projection are peers; groups that see every token need none.
        assert {site.pool for site in here} == ({f"{path}.*"} if name == "JetMoe" else {""})
        whole = torch.cat([site.weight(model) for site in here])
        assert torch.equal(whole.view_as(before[f"{path}.weight"]), before[f"{path}.weight"])
    if name == "DeepseekV4":
        return  # Its experts are fused beside its groups; what becomes of those is tried elsewhere.
    group(model)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[key], p) for key, p in before.items())


@pytest.mark.parametrize("name", CASES)
def test_both_formats_load_and_agree(name: str, tokens: str, tmp_path: Path) -> None:  # noqa: F811
    build(name).bfloat16().save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "method": {"name": "two_sided", "bias": False},
        "allocation": "uniform",
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": {"source": tokens},
    }
    small = compress(recipe_from(values))
    entry = json.loads((tmp_path / "small/config.json").read_text())["rankwise"]
    assert entry["format"] == FORMAT_VERSION
    assert "reads formats 1 to 11" in unmet(entry, known=WITHOUT_GROUPS)
    inside = [key for key in small.plan.cuts if any(f"model.{path}." in key for path in entry["grouped"])]
    assert len(inside) == 2 * CASES[name][1]
    assert not any(small.plan.cuts[key].dense for key in inside)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(small.model))
    assert torch.equal(logits(load_model(str(tmp_path / "small"), precision="stored").model), logits(loaded))
    plain = compress(recipe_from({**values, "format": "dense", "output": str(tmp_path / "plain")}))
    assert plain.report.after == plain.report.before
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, GroupedLinear) for module in dense.modules())
    assert torch.equal(logits(dense), logits(plain.model))
    assert (logits(dense) - logits(loaded)).abs().max() < 0.1 * logits(loaded).abs().max()


@pytest.mark.parametrize("name", CASES)
def test_what_only_looks_like_groups_is_left(name: str) -> None:
    model = build(name)
    paths = [path for path, module in model.named_modules() if groups_of(module)]
    whole: Any = model.get_submodule(paths[0])
    kind = type(whole)

    def of_experts(self: Any, inputs: Any, expert_size: Any) -> Any:
        return 2 * kind.forward(self, inputs, expert_size)

    def of_groups(self: Any, x: Any) -> Any:
        return 2 * kind.forward(self, x)

    whole.__class__ = type("Doubled", (kind,), {"forward": of_experts if name == "JetMoe" else of_groups})
    assert groups_of(whole)
    found = unfuse_experts(model)
    assert found.left == ("Doubled",)
    assert not any(part.startswith(f"{paths[0]}.") for part in found.parts)
    assert isinstance(model.get_submodule(paths[1]), GroupedLinear)
    whole.extra = nn.Parameter(torch.zeros(3))
    assert not groups_of(whole)
    with pytest.raises(ValueError, match="no linear layers that are known"):
        ungroup(model, [paths[0]])


def test_operations_of_experts_count_by_the_tokens_that_come_to_them() -> None:
    model = build("JetMoe")
    model.config._attn_implementation = "eager"
    unfuse_experts(model)
    counted = count_operations(model, torch.float32, tokens=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=IDENTIFIERS[:1], use_cache=False)
    assert counted.macs == counter.get_total_flops() / 2


def test_an_expert_is_told_of_once_though_its_projections_lie_in_two_weights() -> None:
    model, reporter = build("JetMoe"), Reporter(show=False)
    unfuse_experts(model)
    store = SimpleNamespace(reach=lambda site: Reach(3, site.n, 3.0) if site.pool else None)
    note_experts(find_sites(model), cast(Any, store), reporter)
    # Four of the MLP and four of attention in each of two blocks.
    assert reporter.notes[0].startswith("16 of 16 experts saw")
    assert "model.layers.0.mlp, expert 0 3" in reporter.notes[0]


def test_experts_without_tokens_are_not_run() -> None:
    model = build("JetMoe")
    unfuse_experts(model)
    grouped: Any = model.get_submodule("model.layers.0.mlp.input_linear")
    run: list[int] = []
    for number, layer in enumerate(grouped.children()):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    assert grouped(torch.randn(5, 32), [0, 3, 0, 2]).shape == (5, 128)
    assert run == [1, 3]
    assert grouped(torch.randn(0, 32), [0, 0, 0, 0]).shape == (0, 128)


def test_a_bias_that_was_added_has_no_place_in_one_weight(tokens: str, tmp_path: Path) -> None:  # noqa: F811
    build("JetMoe").save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "method": "bolaco",
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": {"source": tokens},
    }
    with pytest.raises(ModelError, match="no place for the bias"):
        compress(recipe_from({**values, "format": "dense"}))
    small = compress(recipe_from(values))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(small.model))
