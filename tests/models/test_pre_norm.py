"""What can be sliced is found out by trying; everything else is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from rankwise.errors import ModelError
from rankwise.layers.stream_form import check_form
from rankwise.models import PreNorm, find_sites, unfuse_experts
from sliced_families import of_family

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
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("norms behind halves", "OPT", {**OPT, "do_layer_norm_before": False}, "do not stand before"),
    ("no last norm", "OPT", {**OPT, "_remove_final_layer_norm": True}, "is no norm of the name"),
    ("narrow embeddings", "OPT", {**OPT, "word_embed_proj_dim": 16}, "32 numbers a token, its embedding 16"),
    ("scaled embeddings", "Gemma", HEADS, "something else than the sum"),
    ("normalised embeddings", "Bloom", {}, "something else than the sum"),
    ("a gain that is added to one", "Nemotron", HEADS, "NemotronLayerNorm1P is no x w"),
    ("an epsilon unsaid", "Olmo", HEADS, "OlmoLayerNorm is no x w"),
    ("four norms", "Gemma2", HEADS, "pre_feedforward_layernorm"),
    ("four norms, one of heads", "Gemma3Text", HEADS, "pre_feedforward_layernorm"),
    ("names of norms behind halves", "Olmo2", HEADS, "post_feedforward_layernorm, which are no names"),
    ("other names", "Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "norm_1, attn, norm_2, ffn"),
    ("a bias of its own", "GPTNeoXJapanese", {"intermediate_multiple_size": 2}, "attention.dense_bias"),
    ("experts", "Mixtral", {**HEADS, "num_local_experts": 4}, "mlp.gate.weight"),
    ("a scaled residual", "Granite", {**HEADS, "residual_multiplier": 0.3}, "do more than"),
]


@pytest.mark.parametrize(("what", "family", "changes", "why"), REFUSED, ids=[what for what, *_ in REFUSED])
def test_other_families_are_refused_by_name(what: str, family: str, changes: dict[str, Any], why: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    unfuse_experts(model)
    with pytest.raises(ModelError, match=why) as raised:
        check_form(model, PreNorm.of(model, find_sites(model)), torch.arange(3, 20)[None])
    assert type(model).__name__ in str(raised.value)
    left = ("attention_residual", "block_residual", "rankwise_form")
    assert not any(hasattr(module, name) for module in model.modules() for name in left)


def test_a_llama_is_told_by_what_reads_and_writes() -> None:
    model = tiny_llama()
    form = PreNorm.of(model, find_sites(model))
    attention, mlp = form.halves
    assert attention.readers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert (attention.writer, mlp.writer) == ("self_attn.o_proj", "mlp.down_proj")
    assert mlp.readers == ("mlp.gate_proj", "mlp.up_proj")
    assert (attention.parts, mlp.parts) == (("self_attn",), ("mlp",))
    assert (form.blocks, form.width, form.eps) == ("layers", 32, model.config.rms_norm_eps)
    assert (form.final, form.plain, form.padded, form.biased, form.tables) == ("norm", True, False, (), ())


@pytest.mark.parametrize("family", ["Glm", "Helium", "SmolLM3", "Ernie4_5", "SeedOss", "Arcee", "Granite"])
def test_other_families_of_rms_norms_are_taken(family: str) -> None:
    """Granite's embeddings have a factor, which changes nothing in what they are summed up from."""
    changes = {**HEADS, "embedding_multiplier": 3.0} if family == "Granite" else HEADS
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**{**SHAPE, **changes}))
    form = PreNorm.of(model.eval(), find_sites(model))
    check_form(model, form, torch.arange(3, 20)[None])
    assert form.plain


def test_what_names_do_not_say_is_seen() -> None:
    """Of one class of blocks one reads the same stream twice and the other does not."""
    opt, neox, after, gptj = (
        PreNorm.of(model, find_sites(model))
        for model in map(of_family, ("opt", "neox", "neox one after the other", "gptj"))
    )
    assert (neox.parallel, after.parallel, neox.halves) == (True, False, after.halves)
    assert (neox.halves[0].readers, neox.halves[0].writer) == (("attention.query_key_value",), "attention.dense")
    assert (opt.blocks, opt.final, opt.tables) == (
        "decoder.layers",
        "decoder.final_layer_norm",
        ("decoder.embed_positions",),
    )
    assert (opt.halves[1].parts, opt.halves[1].readers) == (("fc1", "activation_fn", "fc2"), ("fc1",))
    assert (opt.pair, opt.padded, opt.biased) == (False, False, ())
    assert gptj.halves[0].norm == gptj.halves[1].norm == "ln_1"
    assert (gptj.parallel, gptj.pair, gptj.padded) == (True, True, True)
    assert gptj.biased == ("attn.k_proj", "attn.v_proj", "attn.q_proj")


def test_blocks_that_differ_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    with pytest.raises(ModelError, match="different epsilons"):
        PreNorm.of(model, find_sites(model))
