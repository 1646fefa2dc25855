"""Couplings: found by names and shapes, and believed only where the smaller model says what it should."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from rankwise.errors import ModelError
from rankwise.evaluation import count_operations
from rankwise.layers import BiasedLinear
from rankwise.models import find_couplings, find_sites, shrink, shrinking, usable_couplings
from rankwise.models.couplings import Section

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
GROUPED = {**SHAPE, **TOKENS, "intermediate_size": 48, "num_key_value_heads": 2}
IDS = torch.arange(3, 19)[None]

KNOWN: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (LlamaConfig(**GROUPED), {"heads": 2, "channels": 48}),
    "qwen2": (Qwen2Config(**GROUPED), {"heads": 2, "channels": 48}),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=16), {"heads": 2, "channels": 48}),
    "phi3": (Phi3Config(**GROUPED), {"heads": 2, "channels": 48}),
    "gemma": (GemmaConfig(**GROUPED, head_dim=16), {"heads": 2, "channels": 48}),
    "phi": (PhiConfig(**SHAPE, **TOKENS, intermediate_size=48), {"heads": 4, "channels": 48}),
    "opt": (OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32), {"channels": 48}),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32), {"channels": 128}),
    "olmo2": (Olmo2Config(**GROUPED), {"channels": 48}),
    "mixtral": (MixtralConfig(**GROUPED), {"heads": 2}),
}


def built(config: Any) -> Any:
    """A random model whose biases and gains are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_units_of_a_family_are_known_or_named(name: str) -> None:
    """Every kind of unit can go, block by block, or it is said why not."""
    config, expected = KNOWN[name]
    model = built(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    couplings, reasons = usable_couplings(model, find_sites(model), IDS, BiasedLinear)
    assert {coupling.kind: coupling.units for coupling in couplings} == expected
    assert set(reasons) == {"heads", "channels"} - set(expected)
    assert all(reasons.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(couplings) == 2 * len(expected)
    if name == "olmo2":
        assert "q_norm" in reasons["heads"]  # A norm over all heads changes when one goes.


class Reversed(Section):
    """The rows of another unit."""

    def of(self, units: torch.Tensor) -> torch.Tensor:
        return super().of(47 - units)


def test_wrong_couplings_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another channel: shapes fit, and what the smaller model says does not."""
    model = built(KNOWN["llama"][0])
    sites = find_sites(model)

    def wrong(model: Any, sites: Any) -> list[Any]:
        found = find_couplings(model, sites)
        return [
            each if each.kind == "heads" else replace(each, rows=(Reversed(each.rows[0].site, 0, 1), *each.rows[1:]))
            for each in found
        ]

    monkeypatch.setattr(shrinking, "find_couplings", wrong)
    couplings, reasons = usable_couplings(model, sites, IDS, BiasedLinear)
    assert {coupling.kind for coupling in couplings} == {"heads"}
    assert "says something else" in reasons["channels"]


def test_a_shared_weight_is_refused() -> None:
    model = built(KNOWN["llama"][0])
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ModelError, match="share one weight"):
        find_couplings(model, find_sites(model))


def test_heads_that_do_not_divide_are_refused() -> None:
    model = built(KNOWN["llama"][0])
    model.config.num_key_value_heads = 3
    with pytest.raises(ModelError, match="do not divide into 3 groups"):
        find_couplings(model, find_sites(model))


def test_a_group_of_heads_takes_its_query_heads_along() -> None:
    model = built(KNOWN["llama"][0])
    sites = find_sites(model)
    both = [each for each in find_couplings(model, sites) if each.kind == "heads"]
    heads = both[0]
    # d = 32, d_h = 8, 2 query heads a group: (2 gamma + 2) d_h d numbers.
    assert heads.numbers(32, 32) == (2 * 2 + 2) * 8 * 32
    assert heads.columns.of(torch.tensor([1])).tolist() == list(range(16, 32))
    small = shrink(model, both, sites, {heads.name: torch.tensor([1])}, {}, BiasedLinear)
    attention, old = small.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, old.q_proj.weight[16:])
    assert torch.equal(attention.k_proj.weight, old.k_proj.weight[8:])
    assert torch.equal(attention.o_proj.weight, old.o_proj.weight[:, 16:])
    # T^2 heads (d_qk + d_v), of 2 heads in one layer and 4 in the other; a key and a value of 1 + 2 groups a token.
    counted = count_operations(small, torch.float32, tokens=10)
    assert counted.attention_macs == 100 * 6 * 16
    assert counted.cache_bytes_a_token == 4 * 3 * 16


def test_sizes_stand_in_the_config_layer_by_layer_or_once() -> None:
    model = built(KNOWN["llama"][0])
    sites = find_sites(model)
    couplings = [each for each in find_couplings(model, sites) if each.kind == "channels"]
    one = shrink(model, couplings, sites, {couplings[0].name: torch.arange(40)}, {}, BiasedLinear)
    assert [layer.intermediate_size for layer in one.config.per_layer_config] == [40, 48]
    assert [layer.mlp.up_proj.out_features for layer in one.model.layers] == [40, 48]
    both = shrink(model, couplings, sites, {each.name: torch.arange(40) for each in couplings}, {}, BiasedLinear)
    assert both.config.intermediate_size == 40
    assert not both.config.is_heterogeneous
    assert model.config.intermediate_size == 48
    with pytest.raises(ModelError, match="sizes of their own already"):
        find_couplings(one, find_sites(one))


def test_a_bias_without_a_place_gets_a_layer_of_ours() -> None:
    model = built(KNOWN["qwen2"][0])
    sites = find_sites(model)
    couplings = find_couplings(model, sites)
    heads = next(each for each in couplings if each.kind == "heads")
    weight, bias = torch.randn(32, 16), torch.randn(32)
    consumers = {heads.columns.site: (weight, bias)}
    small = shrink(model, couplings, sites, {heads.name: torch.tensor([0])}, consumers, BiasedLinear)
    layer = small.get_submodule(heads.columns.site)
    assert isinstance(layer, BiasedLinear)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    assert layer.description() == {"storage": "dense", "bias": True}
