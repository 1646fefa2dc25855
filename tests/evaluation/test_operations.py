"""Operations and sizes counted without running agree with torch's counter, with caches and with files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma4UnifiedTextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from conftest import LLAMA_2_7B, Run
from rankwise import compress
from rankwise.checkpoints import empty_model, load_model
from rankwise.evaluation import count_operations
from rankwise.models import unfuse_experts
from rankwise.recipes import recipe_from
from rankwise.sizes import Cut, Plan

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "gemma2": Gemma2Config(**SMALL, head_dim=32),
    # Heads are wider in its second layer.
    "gemma4": Gemma4UnifiedTextConfig(
        **SMALL, head_dim=16, global_head_dim=32, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**LATENT),
}
TOKENS = 48


def counted_by_torch(model: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(TOKENS)[None] + 3)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_and_caches_are_those_of_a_run(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").eval()
    unfuse_experts(model)
    found = count_operations(model, torch.float32, tokens=TOKENS)
    # Routers are few and not counted.
    routed = family in ("mixtral", "deepseek_v3")
    assert found.macs == pytest.approx(counted_by_torch(model), rel=0.01 if routed else 1e-9)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == 4 * found.parameters
    cache = model(input_ids=torch.arange(TOKENS)[None] + 3, use_cache=True).past_key_values
    kept = sum(t.numel() * t.itemsize for layer in cache.layers for t in (layer.keys, layer.values))
    assert found.cache_bytes_a_token == kept / TOKENS


@pytest.mark.parametrize("options", [{}, {"method": "quantize", "budget": {"bits": 3}}], ids=["low rank", "codes"])
def test_a_plan_a_config_and_a_checkpoint_count_the_same(
    options: dict[str, Any], settings: Callable[..., dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = compress(recipe_from(settings(output=str(output), **options)))
    loaded = load_model(str(output))
    held = count_operations(loaded.model, torch.float32, stored_dtypes=loaded.stored_dtypes)
    assert held.parameters == result.report.after.parameters
    assert held.weight_bytes == result.report.after.bytes
    assert count_operations(empty_model(str(output)), torch.float32) == held
    dense = empty_model(str(tiny))
    planned = count_operations(
        dense, torch.float32, plan=Plan.load(output / "plan.json"), adds_bias=result.report.after.linear_biases > 0
    )
    assert (planned.parameters, planned.macs) == (held.parameters, held.macs)
    assert planned.weight_bytes == pytest.approx(held.weight_bytes, rel=0.01)
    if not options:
        # What decodes codes are products too, of a matrix of signs; no product of the model's own.
        loaded.model.config._attn_implementation = "eager"
        assert held.macs == pytest.approx(counted_by_torch(loaded.model) * 64 / TOKENS, rel=0.2)


def test_published_costs_of_llama_2(shared: Path, tmp_path: Path) -> None:
    """Table 7 of the Bolaco paper: MACs of 64 tokens of the dense model, and parameters of the plans of Table 8."""
    tables = json.loads((shared / "reference/bolaco_tables.json").read_text())
    LlamaConfig(**LLAMA_2_7B, dtype="float16").save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    dense = count_operations(model, torch.float16)
    row = next(row for row in tables["table7"] if row["model"] == "7b" and row["method"] == "dense")
    assert dense.macs / 1e9 == pytest.approx(row["macs_g"], rel=1e-3)
    assert round(dense.parameters / 1e9, 2) == row["params_b"]
    assert dense.weight_bytes / 2**30 == pytest.approx(row["memory_gib"], rel=0.01)
    column = {"q_proj": 0, "k_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 3, "down_proj": 4}
    for name, billions in (("7b 20% 5x1", 5.44), ("7b 30% 5x1", 4.79), ("7b 30% 5x4", 4.80)):
        quarters = tables["table8"][name]
        shapes, cuts = {}, {}
        for site, module in model.named_modules():
            if ".layers." in site and isinstance(module, torch.nn.Linear):
                shapes[site] = tuple(module.weight.shape)
                ranks = quarters[int(site.split(".")[2]) * len(quarters) // 32]
                role = site.rpartition(".")[2]
                cuts[site] = Cut(ranks[column[role]] if role in column else None)
        plan = Plan(
            architecture="LlamaForCausalLM",
            method="bolaco",
            allocation="bayesian",
            rank_multiple=1,
            form={"number_bits": 16, "storage": "two_factor"},
            shapes=shapes,
            cuts=cuts,
        )
        found = count_operations(model, torch.float16, plan=plan, adds_bias=True)
        assert found.parameters / 1e9 == pytest.approx(billions, rel=0.0025)
        # Every number of a linear layer is multiplied once a token, the embedding's never.
        biases = sum(shapes[site][0] for site, cut in cuts.items() if not cut.dense)
        linear = found.parameters - biases - 32000 * 4096 - 65 * 4096
        assert found.macs == 64 * linear + (found.attention_macs or 0)


def test_seventy_billion_are_counted_from_a_config_in_seconds(rankwise: Run, tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    started = time.monotonic()
    status, out, error = rankwise("cost", tmp_path, "--json")
    assert status == 0, error
    assert time.monotonic() - started < 60
    (found,) = json.loads(out).values()
    assert found["parameters"] == 70_553_706_496
    assert found["cache_bytes_a_token"] == 2 * 80 * 8 * 128 * 2
    status, out, _ = rankwise("cost", tmp_path)
    assert status == 0
    assert "141.11 GB" in out


def test_a_plan_for_other_shapes_is_refused(
    rankwise: Run, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    compress(recipe_from(settings(output=str(tmp_path / "out"))))
    other = tmp_path / "other"
    LlamaConfig(**SMALL).save_pretrained(other)
    status, _, error = rankwise("cost", other, "--plan", tmp_path / "out/plan.json")
    assert status == 2
    assert "plan.json" in error


def test_the_command_counts_an_expert_by_what_comes_to_it(rankwise: Run, tmp_path: Path) -> None:
    FAMILIES["mixtral"].save_pretrained(tmp_path)
    status, out, error = rankwise("cost", tmp_path, "--tokens", TOKENS, "--json")
    assert status == 0, error
    (found,) = json.loads(out).values()
    model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"], attn_implementation="eager").eval()
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    unfuse_experts(model)
    assert found["macs"] == pytest.approx(counted_by_torch(model), rel=0.01)
