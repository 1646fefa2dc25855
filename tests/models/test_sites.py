"""Sites: found in every layout, roles by name, shared inputs by watching."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from conftest import tiny_llama
from rankwise.errors import ModelError, NotFiniteError
from rankwise.models import find_sites, share_inputs, shared_layers, stacked_parameters, unfuse_experts


def test_llama_sites_roles_shapes_and_shared_inputs() -> None:
    model = tiny_llama()
    sites = share_inputs(model, find_sites(model), torch.arange(5)[None])
    first = {site.role: site for site in sites if site.block == 0}
    assert list(first) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {role: (s.m, s.n) for role, s in first.items()} == {
        "q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (80, 32), "up": (80, 32), "down": (32, 80),
    }  # fmt: skip
    assert first["q"].group == first["k"].group == first["v"].group
    assert first["gate"].group == first["up"].group
    assert len({first[role].group for role in ("q", "o", "gate", "down")}) == 4
    assert sum(s.parameters for s in sites) == sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)


def test_gpt2_weights_are_transposed_views() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    site = next(s for s in find_sites(model) if s.role == "c_fc")
    assert (site.m, site.n, site.transposed, site.has_bias) == (64, 16, True, True)
    module = site.module(model)
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), x @ site.weight(model).T + site.bias(model))


def test_experts_in_fused_tensors_are_counted_as_no_sites() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    assert {site.role for site in find_sites(model)} >= {"q", "k", "v", "o"}
    assert stacked_parameters(model) == 2 * 3 * 16 * 32
    assert stacked_parameters(tiny_llama()) == 0


def test_a_router_beside_experts_of_an_unknown_layout_is_no_site() -> None:
    """Llama 4's is a linear layer that gives two things."""
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4, interleave_moe_layer_step=1,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    model.model.layers[0].feed_forward.experts.scale = nn.Parameter(torch.ones(4))
    assert unfuse_experts(model).parts == {}
    assert stacked_parameters(model) == 4 * 3 * 16 * 32
    names = [site.name.partition("feed_forward.")[2] for site in find_sites(model)]
    assert [name for name in names if name] == [f"shared_expert.{each}_proj" for each in ("gate", "up", "down")]


def test_layers_that_share_a_weight_are_no_sites() -> None:
    """Zamba runs one transformer block at several depths."""
    model = tiny_llama()
    before = [site.name for site in find_sites(model)]
    first, second = model.model.layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.o_proj = first.self_attn.o_proj
    left = {name for name in before if name not in [site.name for site in find_sites(model)]}
    shared = {"self_attn.o_proj", "mlp.up_proj"}
    assert left == {f"model.layers.{index}.{name}" for index in range(2) for name in shared}
    sizes = {name: model.get_submodule(f"model.layers.0.{name}").weight.numel() for name in shared}
    assert shared_layers(model) == {f"model.layers.0.{name}": size for name, size in sizes.items()}
    assert shared_layers(tiny_llama()) == {}


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    site = next(s for s in find_sites(model) if s.name == "model.layers.1.mlp.up_proj")
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        site.weight(model)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2)])])
def test_a_model_without_linear_blocks_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError):
        find_sites(nn.Sequential(module))
