"""Experts whose class does not say how it keeps them: read off names and shapes, and tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_architectures import SMALL, tokens  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.layers.needs import WITHOUT_GROUPS
from rankwise.models import UnfusedExperts, find_sites, fuse, unfuse_experts
from rankwise.recipes import recipe_from

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Two tensors of three dimensions, inputs first; every expert is handed all tokens, most of them zeroed.
    "Llama4Text": (
        "model.layers.{}.feed_forward.experts",
        {
            **SMALL,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
        },
    ),
    # Three matrices in a module inside, the experts' rows one below another.
    "Dbrx": (
        "transformer.blocks.{}.ffn.experts",
        {
            **dict.fromkeys(("vocab_size", "max_seq_len"), 128),
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "pad_token_id": 0,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    # Experts without weights beside those with; the tensor of gate and up has room for them, too.
    "LongcatFlash": (
        "model.layers.{}.mlp.experts",
        {
            **{key: value for key, value in SMALL.items() if key != "num_hidden_layers"},
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 4,
            "zero_expert_num": 3,
            "moe_topk": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
IDENTIFIERS = torch.arange(32).view(2, 16)


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**CASES[name][1])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for key, parameter in model.named_parameters():
        if ".experts." in key and parameter.ndim == 3:
            # Room that nothing uses; nothing is kept of what lies there.
            parameter.data[4:] = 0
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDENTIFIERS, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_every_expert_becomes_plain_layers_and_goes_back(name: str) -> None:
    model, path = build(name), CASES[name][0]
    before, expected = {key: p.clone() for key, p in model.named_parameters()}, logits(model)
    whole = {key: p[:4] if p.ndim == 3 else p for key, p in before.items() if ".experts." in key}
    found = unfuse_experts(model)
    assert found.left == ()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not any("router" in site.name for site in find_sites(model))
    experts = [site for site in find_sites(model) if site.pool]
    assert [site.role for site in experts] == ["gate", "up", "down"] * 8
    assert len({site.pool for site in experts}) == 6
    assert sum(site.parameters for site in experts) == sum(p.numel() for p in whole.values())
    for key, tensor in whole.items():
        seen = [site.weight(model).flatten() for site in experts if found.parts[f"{site.name}.weight"] == key]
        assert torch.equal(torch.cat(seen).sort().values, tensor.flatten().sort().values)
    assert fuse(model) == [path.format(index) for index in range(2)]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[key], p) for key, p in before.items())


@pytest.mark.parametrize("name", CASES)
def test_both_formats_load_and_agree(name: str, tokens: str, tmp_path: Path) -> None:  # noqa: F811
    build(name).bfloat16().save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "method": {"name": "two_sided", "bias": False},
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": {"source": tokens},
    }
    small = compress(recipe_from(values))
    assert sum(".experts." in key and not cut.dense for key, cut in small.plan.cuts.items()) > 12
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(small.model))
    assert torch.equal(logits(load_model(str(tmp_path / "small"), precision="stored").model), logits(loaded))
    entry = json.loads((tmp_path / "small/config.json").read_text())["rankwise"]
    assert (entry["format"], len(entry["experts"])) == (WITHOUT_GROUPS, 2)
    plain = compress(recipe_from({**values, "format": "dense", "output": str(tmp_path / "plain")}))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, UnfusedExperts) for module in dense.modules())
    assert torch.equal(logits(dense), logits(plain.model))
    assert (logits(dense) - logits(loaded)).abs().max() < 0.1 * logits(loaded).abs().max()


def _doubled(kind: Any) -> type:
    return type("Doubled", (kind,), {"forward": lambda self, *given: 2 * kind.forward(self, *given)})


@pytest.mark.parametrize("name", CASES)
def test_a_layout_that_only_looks_alike_is_left(name: str) -> None:
    """Names and shapes are the same, what is computed is not; or there is a parameter more."""
    model = build(name)
    for index in range(2):
        experts = model.get_submodule(CASES[name][0].format(index))
        experts.__class__ = _doubled(type(experts))
    assert unfuse_experts(model).left == ("Doubled", "Doubled")
    experts = build(name).get_submodule(CASES[name][0].format(0))
    experts.scale = nn.Parameter(torch.ones(4))
    assert unfuse_experts(nn.ModuleDict({"experts": experts})).parts == {}


def test_a_token_that_an_expert_is_not_to_see_stays_zero() -> None:
    """Though a bias was added, as compression does."""
    model = build("Llama4Text")
    unfuse_experts(model)
    experts = model.model.layers[0].feed_forward.experts
    layer = experts.get_submodule("1.down_proj")
    layer.bias = nn.Parameter(torch.ones(32))
    x = torch.randn(4 * 3, 32)
    x[4] = 0
    with torch.no_grad():
        found = experts(x)
        assert not found[4].any()
        layer.bias.zero_()
        torch.testing.assert_close(found[5], experts(x)[5] + 1)
