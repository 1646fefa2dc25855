"""Where in a vision-language model the language model lies, and what can be had of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from conftest import tiny_llama
from rankwise.checkpoints import load_model
from rankwise.checkpoints.image_probe import image_inputs
from rankwise.errors import ModelError
from rankwise.models import BlockRunner, Head, beside_language_model, decoder_blocks, find_sites, language_model
from vision_models import FAMILIES, IMAGE, tiny_seeing

IDS = torch.arange(3, 27)[None]


def test_a_large_vision_tower_is_not_taken_for_the_decoder() -> None:
    config = {**FAMILIES["llava"]}
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 12, "intermediate_size": 96}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **config))
    prefix, blocks = decoder_blocks(model)
    assert prefix == "model.language_model.layers"
    assert blocks is model.model.language_model.layers
    tower = sum(p.numel() for p in model.model.vision_tower.encoder.layers.parameters())
    assert tower > sum(p.numel() for p in blocks.parameters())
    assert {site.block for site in find_sites(model)} == {0, 1}


def test_a_model_of_text_alone_is_its_own_language_model() -> None:
    model = tiny_llama()
    assert language_model(model) == ("", model)
    assert decoder_blocks(model)[0] == "model.layers"
    assert image_inputs(model, IDS) == {}


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_what_lies_beside_the_language_model_is_counted(kind: str) -> None:
    model = tiny_seeing(kind)
    inside = sum(p.numel() for p in language_model(model)[1].parameters()) + model.lm_head.weight.numel()
    assert beside_language_model(model) == sum(p.numel() for p in model.parameters()) - inside > 0


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3"])
def test_blocks_and_head_are_run_by_themselves(kind: str) -> None:
    model = tiny_seeing(kind)
    ids = torch.randint(0, 2000, (4, 12), generator=torch.Generator().manual_seed(0))
    assert BlockRunner(model, ids, 2).alone()
    assert Head(model, ids).apart


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_image_is_made_from_the_config(kind: str) -> None:
    model = tiny_seeing(kind)
    given = image_inputs(model, IDS)
    assert (given["input_ids"] == IMAGE).sum() > 0
    assert (given["input_ids"] != IMAGE).sum() == 8
    with torch.no_grad():
        seen = model(**given).logits
        assert torch.equal(model(**image_inputs(model, IDS)).logits, seen)
        other = {**given, "pixel_values": 0.5 * given["pixel_values"]}
        assert not torch.equal(model(**other).logits, seen)


LLAMA4: dict[str, Any] = {
    "text_config": {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
}


def test_a_language_model_outside_the_base_model_is_refused(tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_config(AutoConfig.for_model("llama4", **LLAMA4)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="language model of Llama4ForConditionalGeneration lies in language_model, not"
    ):
        load_model(str(tmp_path))
