"""Tiny random models of the families whose norms are LayerNorm, or whose attention and MLP stand side by side."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_OPT = {"ffn_dim": 72, "word_embed_proj_dim": 32}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}
_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
_FALCON = {"new_decoder_architecture": False, "bias": False}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt without gains": ("opt", {**_OPT, "layer_norm_elementwise_affine": False}),
    "opt without biases": ("opt", {**_OPT, "enable_bias": False}),
    "gpt2": ("gpt2", _GPT),
    "bigcode": ("gpt_bigcode", _GPT),
    "gpt-neo": ("gpt_neo", _NEO),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", _GROUPED),
    "jais2": ("jais2", _GROUPED),
    "neox one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon-rw": ("falcon", {**_FALCON, "parallel_attn": False, "alibi": True, "bias": True, "multi_query": False}),
    "neox": ("gpt_neox", {"use_parallel_residual": True}),
    "phi": ("phi", {}),
    "phi, tied": ("phi", {"tie_word_embeddings": True}),
    "gptj": ("gptj", _GPT),
    "codegen": ("codegen", _GPT),
    "stablelm side by side": ("stablelm", {**_GROUPED, "use_parallel_residual": True}),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "cohere": ("cohere", {**_GROUPED, "use_qk_norm": True}),
    "cohere2": ("cohere2", _GROUPED),
}
"""By a name: the type of the model and its settings."""

SIDE_BY_SIDE = list(FAMILIES)[list(FAMILIES).index("neox") :]
"""Those whose attention and MLP read the same stream."""


def of_family(name: str, **changes: Any) -> Any:
    """A random model, in evaluation mode, whose gains, shifts and biases differ from one and zero.

    Args:
        name: one of `FAMILIES`.
        changes: of its settings.
    """
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SHAPE, **settings, **changes})
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in path or "ln_" in path or path.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
