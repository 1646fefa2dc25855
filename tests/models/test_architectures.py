"""Many architectures: compress, write both formats, load both back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.flows.finetune import finetune
from rankwise.recipes import FineTune, recipe_from

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
CASES = {
    "Llama": SMALL,
    "Mistral": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "Gemma2": SMALL,
    "Phi3": SMALL,
    "GPTNeoX": NEOX,
    "GPT2": GPT2,
    "OPT": OPT,
}
WITHOUT_BIAS = ("Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3")
"""Architectures whose plain form has no place for every added bias."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"ids": torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(0))}, path)
    return f"tokens:{path}"


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_site(name: str, tokens: str, tmp_path: Path) -> None:
    """The two-sided method needs a backward pass through code that each architecture writes differently."""
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    values = {"model": str(tmp_path / "dense"), "budget": {"keep": 0.5, "rank_multiple": 1}}
    small = compress(
        recipe_from({**values, "method": "two_sided", "allocation": "uniform", "calibration": {"source": tokens}})
    )
    compressed = [site for site in small.report.sites.values() if site.rank]
    assert len(compressed) == len(small.plan.cuts)
    assert all(0 < site.dropped_energy < 1 for site in compressed)


@pytest.mark.parametrize("name", CASES)
def test_both_formats_load_and_agree(name: str, tokens: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "method": {"name": "bolaco", "bias": name not in WITHOUT_BIAS},
        "budget": {"keep": 0.5, "rank_multiple": 1, "storage": "two_factor"},
        "calibration": {"source": tokens},
    }
    small = compress(recipe_from(values))
    assert 0.45 < small.plan.kept <= 0.5
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = small.model(input_ids=ids).logits
        original = load_model(values["model"]).model(input_ids=ids).logits
        trusted = AutoModelForCausalLM.from_pretrained(values["output"], trust_remote_code=True)
        assert torch.equal(load_model(values["output"]).model(input_ids=ids).logits, expected)
        assert torch.equal(trusted(input_ids=ids).logits, expected)
        plain = compress(recipe_from({**values, "format": "dense", "output": str(tmp_path / "plain")}))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert type(loaded).__name__ == f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}"
        assert torch.equal(loaded(input_ids=ids).logits, plain.model(input_ids=ids).logits)
    # Multiplying back changes rounding only; compressing changed more than that.
    scale = expected.abs().max()
    assert (loaded(input_ids=ids).logits - expected).abs().max() < 1e-4 * scale
    assert (original - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("name", CASES)
def test_pivoted_storage_repair_and_fine_tuning(name: str, tokens: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    values = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "small"),
        "budget": {"keep": 0.6, "rank_multiple": 1, "storage": "pivoted"},
        "calibration": {"source": tokens, "sequences": 16},
        "validation": {"sequences": 8},
        "repair": {"steps": "refit,blocks,subspace,factors", "blocks": {"epochs": 1}, "factors": {"epochs": 1}},
    }
    small = compress(recipe_from(values))
    assert [step.step for step in small.report.repair] == ["refit", "blocks", "subspace", "factors"]
    assert {site.storage for site in small.report.sites.values() if site.rank} == {"pivoted"}
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        trusted = AutoModelForCausalLM.from_pretrained(values["output"], trust_remote_code=True)
        assert torch.equal(trusted(input_ids=ids).logits, small.model(input_ids=ids).logits)
    wanted = FineTune(model=values["output"], data=tokens, output=str(tmp_path / "tuned"), held_out=4)
    report = finetune(wanted)
    assert report.finetune[0].trained_parameters > 0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    with torch.no_grad():
        found, expected = tuned(input_ids=ids).logits, trusted(input_ids=ids).logits
        assert torch.equal(load_model(str(tmp_path / "tuned")).model(input_ids=ids).logits, found)
    assert torch.equal(found, expected) != report.finetune[0].accepted
