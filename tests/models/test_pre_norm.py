"""What can be sliced is found out by trying; everything else is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from rankwise.errors import ModelError
from rankwise.layers.narrowing import check_form
from rankwise.models import PreNorm, find_sites, unfuse_experts

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "no input_layernorm"),
    ("Phi", {}, "side by side"),
    ("Falcon", {}, "no self_attn"),
    ("GPTNeoX", {}, "no self_attn"),
    ("GPT2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "no input_layernorm"),
    ("Gemma", HEADS, "GemmaRMSNorm is no x w"),
    ("Gemma2", HEADS, "pre_feedforward_layernorm"),
    ("Gemma3Text", HEADS, "pre_feedforward_layernorm"),
    ("Olmo2", HEADS, "no input_layernorm"),
    ("StableLm", HEADS, "its norms shift"),
    ("Cohere", HEADS, "side by side"),
    ("Mixtral", {**HEADS, "num_local_experts": 4}, "mlp.gate.weight"),
    ("Granite", {**HEADS, "residual_multiplier": 0.3}, "do more than"),
]


@pytest.mark.parametrize(("family", "changes", "why"), REFUSED, ids=[family for family, _, _ in REFUSED])
def test_other_families_are_refused_by_name(family: str, changes: dict[str, Any], why: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    unfuse_experts(model)
    with pytest.raises(ModelError, match=why) as raised:
        check_form(model, PreNorm.of(model, find_sites(model)), torch.arange(3, 20)[None])
    assert type(model).__name__ in str(raised.value)
    assert not any(hasattr(module, "attention_residual") for module in model.modules())


def test_a_llama_is_told_by_what_reads_and_writes() -> None:
    model = tiny_llama()
    form = PreNorm.of(model, find_sites(model))
    attention, mlp = form.halves
    assert attention.readers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert (attention.writer, mlp.writer) == ("self_attn.o_proj", "mlp.down_proj")
    assert mlp.readers == ("mlp.gate_proj", "mlp.up_proj")
    assert (form.blocks, form.width, form.eps) == ("layers", 32, model.config.rms_norm_eps)


def test_blocks_that_differ_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    with pytest.raises(ModelError, match="different epsilons"):
        PreNorm.of(model, find_sites(model))
