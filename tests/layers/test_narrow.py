"""A residual stream that is turned, and cut: identities that hold exactly, and what the cut costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rankwise.layers import NarrowNorm, narrow_stream, stream_of
from rankwise.layers.narrow import carrying
from rankwise.layers.narrowing import (
    Directions,
    accepts_width,
    fold_gain,
    residual_adapter,
    slice_by_one_rotation,
    slice_with_adapters,
)
from rankwise.layers.stream_form import check_form
from rankwise.linalg import of_equal_norm, principal_directions, second_moment
from rankwise.models import BlockRunner, PreNorm, find_sites

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "llama, tied, biases": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama, tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "rms_norm_eps": 1e-2},
}
IDS = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(1))


def made(kind: str, **changes: Any) -> Any:
    """A random model whose gains and biases differ from one and zero."""
    shape = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**shape, **CHANGES.get(kind, {}), **changes})).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def cut(model: Any, kept: int, adapters: bool, tokens: Any = "normalised") -> Any:
    """A copy with its stream cut."""
    small = copy.deepcopy(model)
    slice_model = slice_with_adapters if adapters else slice_by_one_rotation
    slice_model(small, PreNorm.of(model, find_sites(model)), kept, BlockRunner(small, IDS, 4), tokens, {})
    return small


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def far(found: Tensor, goal: Tensor) -> float:
    return float((found - goal).abs().max() / goal.abs().max())


@given(st.integers(1, 24), st.integers(0, 24), st.sampled_from([1e-6, 1e-2, 1.0]), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_the_cut_norm_is_the_original_one_of_a_padded_vector(k: int, rest: int, eps: float, seed: int) -> None:
    """And a usual norm over k numbers with eps d / k, but for a factor."""
    d = k + rest
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(seed)) * 10 ** float(seed % 5 - 2)
    found = NarrowNorm(d, eps)(x)
    whole = LlamaRMSNorm(d, eps=eps)(torch.cat([x, torch.zeros(3, rest)], -1))[:, :k]
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found, LlamaRMSNorm(k, eps=eps * d / k)(x) * (d / k) ** 0.5, atol=1e-5, rtol=1e-5)
    assert NarrowNorm(d, eps)(x.bfloat16()).dtype == torch.bfloat16


def test_directions_hold_most_first_and_tokens_of_massive_norm_decide_only_when_raw() -> None:
    source = torch.Generator().manual_seed(0)
    ordinary = torch.randn(200, 8, generator=source) * torch.tensor([3.0, 2, 1, 1, 1, 1, 0.1, 0.1])
    massive = torch.zeros(2, 8)
    massive[:, 7] = 1000
    tokens = torch.cat([ordinary, massive])
    q = principal_directions(second_moment(ordinary))
    torch.testing.assert_close(q.T @ q, torch.eye(8, dtype=torch.float64))
    held = (ordinary.double() @ q).square().sum(0)
    assert (held[:-1] >= held[1:]).all()
    first = {}
    for how in ("normalised", "raw"):
        seen = Directions(1e-6, how)  # type: ignore[arg-type]
        for part in tokens.split(50):
            seen.add(part)
        first[how] = int(seen.found()[:, 0].abs().argmax())
    assert first == {"normalised": 0, "raw": 7}
    torch.testing.assert_close(of_equal_norm(tokens, 0.0).norm(dim=-1), torch.full((202,), 8**0.5))
    with pytest.raises(ValueError, match="not finite"):
        principal_directions(torch.full((2, 2), torch.nan, dtype=torch.float64))


def test_a_folded_gain_gives_the_same_outputs() -> None:
    weight, gain, x = torch.randn(5, 4), torch.randn(4), torch.randn(3, 4)
    torch.testing.assert_close(x.double() @ fold_gain(weight, gain).T, (x * gain).double() @ weight.double().T)


def test_the_adapter_between_equal_bases_is_the_identity() -> None:
    q = principal_directions(second_moment(torch.randn(50, 12)))[:, :7]
    torch.testing.assert_close(residual_adapter(q, q), torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "one rotation"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stream_that_is_turned_and_not_cut_gives_the_same_logits(kind: str, adapters: bool) -> None:
    """Every block in directions of its own, or all in the same: s = 0."""
    model = made(kind)
    goal = logits(model)
    check_form(model, PreNorm.of(model, find_sites(model)), IDS[:1])
    assert torch.equal(logits(model), goal)
    small = cut(model, 32, adapters)
    assert far(logits(small), goal) < 1e-5
    assert not torch.allclose(small.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert bool(stream_of(small)) is adapters


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_rotation_is_what_adapters_of_one_basis_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model of width k with its changed epsilon, and the blocks with the cut norm: two ways to one result."""
    model = made(kind)
    q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    monkeypatch.setattr(Directions, "found", lambda _: q)
    plain, carried = cut(model, 24, False), cut(model, 24, True)
    config = plain.config
    assert (config.hidden_size, config.rms_norm_eps) == (24, model.config.rms_norm_eps * 32 / 24)
    assert type(plain.model.layers[0]) is type(model.model.layers[0])
    # The last block of the other does not cut what it gives.
    with torch.no_grad():
        found, goal = (each.base_model(input_ids=IDS, output_hidden_states=True) for each in (plain, carried))
    torch.testing.assert_close(found.hidden_states[1], goal.hidden_states[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "one rotation"])
def test_a_smaller_width_loses_more(adapters: bool) -> None:
    model = made("llama", hidden_size=32, initializer_range=0.05)
    goal = logits(model).log_softmax(-1)
    lost = []
    for kept in (32, 30, 24, 12):
        found = logits(cut(model, kept, adapters)).log_softmax(-1)
        lost.append(float((goal.exp() * (goal - found)).sum(-1).mean()))
    assert abs(lost[0]) < 1e-6
    assert lost[0] < lost[1] < lost[2] < lost[3]


def test_a_narrow_model_is_built_empty_with_the_shapes_of_the_cut_one() -> None:
    for kind in CONFIGS:
        small = cut(made(kind), 24, True)
        with torch.device("meta"):
            empty = type(small)(small.config)
            narrow_stream(empty.base_model, stream_of(small))
        shapes = {name: (p.shape, p.dtype) for name, p in small.named_parameters()}
        assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes


def test_generation_with_a_cache_is_that_without() -> None:
    small = cut(made("qwen2"), 24, True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:2, :6]
    mask = torch.ones_like(ids)
    with_cache, without = (small.generate(ids, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_blocks_are_of_a_class_of_their_own_that_is_never_split() -> None:
    model = made("llama")
    small = cut(model, 24, True)
    kind = type(small.model.layers[0])
    assert kind is carrying(type(model.model.layers[0]))
    assert kind.__name__ == "CarriedLlamaDecoderLayer"
    assert kind.__name__ in small._no_split_modules
    assert kind.__name__ not in model._no_split_modules
    assert isinstance(model.model.layers[0].input_layernorm, LlamaRMSNorm)
    assert isinstance(small.model.layers[0].attention_residual, nn.Linear)


def test_a_config_says_which_widths_it_may_have() -> None:
    llama, qwen = made("llama").config, made("qwen2").config
    assert [k for k in range(20, 32) if accepts_width(llama, k)] == [20, 24, 28]
    assert accepts_width(qwen, 21)
    assert llama.hidden_size == 32
