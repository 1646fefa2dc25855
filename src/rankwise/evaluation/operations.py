"""What running a model takes, counted without running it: operations, memory, and the cache of keys and values.

Multiply-accumulate operations (MACs) of T tokens in one pass, as torch's own counter counts products of matrices:

    T (sum over linear layers of their numbers) + sum over attention layers of T^2 heads (d_qk + d_v)

A low-rank layer has r (m + n) numbers, or r (m + n - r) with pivot rows; of codes, those of Q, L and R, for they are
multiplied decoded. An expert counts by the share of tokens that is routed to it. Routers, lookups, norms, softmax,
rotations of codes and biases are not counted; all products of attention are, masked ones too. Layers that look at a
window alone cache less than the full context, which is what is told. Of a model that reads images too the pass is one
of text: what the language model and the head do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankwise.layers import coded_buffers, is_linear, kind_of, vocabulary_entry
from rankwise.models import GroupedLinear, decoder_blocks, language_model, text_config
from rankwise.sizes import Plan

_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token", "moe_topk")


@dataclass(frozen=True)
class Operations:
    """What running takes.

    Attributes:
        parameters: numbers of the whole model; of codes, those of Q, L and R.
        linear_parameters: of them, in linear layers inside the decoder's blocks.
        tokens: in the pass that is counted.
        macs: multiply-accumulate operations of that pass.
        attention_macs: of them, products of attention; None where the config does not say its shape.
        weight_bytes: all weights as they are stored; also the memory they take when loaded as stored.
        float32_bytes: the memory they take when loaded in float32, codes decoded.
        context: tokens of the longest sequence, None where the config does not say.
        cache_bytes_a_token: keys and values of one token, stored as the weights are; None like `attention_macs`.
    """

    parameters: int
    linear_parameters: int
    tokens: int
    macs: int
    attention_macs: int | None
    weight_bytes: int
    float32_bytes: int
    context: int | None
    cache_bytes_a_token: int | None


@dataclass(frozen=True)
class _Attention:
    """Attention layers that are alike.

    Attributes:
        layers: how many.
        width: of all heads of a layer, queries and values together: heads (d_qk + d_v).
        cached_numbers: that a layer keeps of a token.
    """

    layers: int
    width: int
    cached_numbers: int

    def macs(self, tokens: int) -> int:
        return self.layers * tokens * tokens * self.width

    def cached(self, width: int) -> int:
        return self.layers * self.cached_numbers * width


def _attention_of(config: Any) -> _Attention | None:
    """The shape of attention as a config says it; layers that are not attention are left out."""
    if getattr(config, "is_heterogeneous", False):
        return _of_layers([config.per_layer_config[index] for index in range(config.num_hidden_layers)])
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(layers, int) and isinstance(hidden, int)):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    d = getattr(config, "head_dim", None) or hidden // heads
    # Latent attention (DeepSeek): keys and values of different widths, made from what is cached.
    d_qk, d_v = getattr(config, "qk_head_dim", None) or d, getattr(config, "v_head_dim", None) or d
    latent = getattr(config, "kv_lora_rank", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cached = latent + config.qk_rope_head_dim if latent else kv_heads * (d_qk + d_v)
    return _Attention(layers, heads * (d_qk + d_v), cached)


def _of_layers(configs: Sequence[Any]) -> _Attention | None:
    """That of layers which differ, as one layer with the heads of all."""
    found = [_attention_of(config) for config in configs]
    each = [attention for attention in found if attention is not None]
    if len(each) < len(found):
        return None
    return _Attention(1, sum(one.width for one in each), sum(one.cached_numbers for one in each))


def _routed_share(config: Any) -> float:
    """Of the tokens, the share that one expert sees on the average."""
    experts = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), None)
    chosen = next((getattr(config, key) for key in _CHOSEN if getattr(config, key, None)), None)
    return chosen / experts if experts and chosen else 1.0


def _entries(plan: Plan, name: str) -> int:
    """Numbers of a weight under its cut."""
    shape, cut = plan.shapes[name], plan.cuts[name]
    if cut.dense:
        return shape[0] * shape[1]
    if not cut.coded:
        rank = cut.rank or 0
        return rank * (sum(shape) - (rank if plan.form.pivots(shape, rank) else 0))
    return (shape[0] * shape[1] if cut.q_bits else 0) + (cut.rank or 0) * sum(shape)


def count_operations(
    model: Any,
    stored: torch.dtype,
    *,
    tokens: int = 64,
    plan: Plan | None = None,
    adds_bias: bool = False,
    stored_dtypes: Mapping[str, torch.dtype] | None = None,
) -> Operations:
    """Count a model, or a dense one under a plan.

    Args:
        model: causal language model, dense or compressed, on any device (also `meta`); fused experts taken apart.
        stored: type of its numbers in the checkpoint.
        tokens: T, of one pass of one sequence.
        plan: cuts for a dense model.
        adds_bias: whether the plan's method gives a bias to sites that had none.
        stored_dtypes: by parameter name, where types differ.
    """
    config = text_config(model.config)
    share, width = _routed_share(config), stored.itemsize
    prefix = decoder_blocks(model)[0] + "."
    path, head = language_model(model)[0], model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if is_linear(m) and not _inside_another(n, model)}
    grouped = [(n, m) for n, m in model.named_modules() if isinstance(m, GroupedLinear) and m.routed]
    routed = {f"{name}.{number}" for name, module in grouped for number, _ in module.named_children()}
    parameters = linear_parameters = 0
    per_token = 0.0
    size = 0
    for name, layer in linear.items():
        kind = kind_of(layer)
        if plan is not None and name in plan.shapes:
            count = _entries(plan, name)
            size += -(-plan.site_bits(name) // 8)
            if adds_bias and layer.bias is None and not plan.cuts[name].dense:
                parameters += plan.shapes[name][0]
                size += plan.shapes[name][0] * width
        else:
            count = kind.entries(layer)
        parameters += count
        linear_parameters += count if name.startswith(prefix) else 0
        if not path or name.startswith(f"{path}.") or layer is head:
            per_token += count * (share if name in routed or _EXPERT.search(name) else 1.0)
    planned = set() if plan is None else set(plan.shapes)
    inside = tuple(f"{name}." for name in linear)
    dtypes = stored_dtypes or {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in planned or not name.endswith(".weight"):
            # What no type is known of is stored as the rest is, codes as they are.
            bits = dtypes.get(name, stored if parameter.is_floating_point() else parameter.dtype)
            size += parameter.numel() * bits.itemsize
        if not name.startswith(inside) or name.endswith("bias"):
            parameters += parameter.numel()
    size += sum(b.numel() * b.itemsize for name, b in model.named_buffers() if name.startswith(inside))
    looked_up = {name: codes for name, codes in coded_buffers(model).items() if not name.startswith(inside)}
    for name, codes in looked_up.items():
        scales = model.get_submodule(name.rpartition(".")[0]).scale.numel()
        size += codes.numel() * codes.itemsize
        parameters += (0 if vocabulary_entry(model).get("head", {}).get("tied") else codes.numel()) - scales
    tied = getattr(head, "weight", None) is model.get_input_embeddings().weight
    if tied:
        # Its numbers are the embedding's, which were counted with the parameters.
        parameters -= head.weight.numel()
    attention = _attention_of(config)
    attended = None if attention is None else attention.macs(tokens)
    return Operations(
        parameters=parameters,
        linear_parameters=linear_parameters,
        tokens=tokens,
        macs=round(per_token * tokens) + (attended or 0),
        attention_macs=attended,
        weight_bytes=size,
        float32_bytes=4 * parameters,
        context=getattr(config, "max_position_embeddings", None),
        cache_bytes_a_token=None if attention is None else attention.cached(width),
    )


def _inside_another(name: str, model: nn.Module) -> bool:
    """Whether a module is a part of a linear layer of ours."""
    parent = name.rpartition(".")[0]
    return bool(parent) and is_linear(model.get_submodule(parent))
