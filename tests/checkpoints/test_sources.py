"""What is in memory is what the source describes: adapters, codes, tensors too many, models that see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import IDS, Run, failed, tiny_llama
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.errors import ModelError
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from

Settings = Callable[..., dict[str, Any]]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([IDS])).logits


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def adapted(tiny: Path) -> Path:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tiny)
    assert (tiny / "adapter_model.safetensors").exists()
    return tiny


def test_an_adapter_beside_the_weights_is_merged_and_said(adapted: Path, settings: Settings, tmp_path: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(adapted))
    loaded = load_model(str(adapted))
    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(tiny_llama())).abs().max() > 0.01
    assert "adapter_config.json" in loaded.notes[0]
    assert list(loaded.model.state_dict()) == list(tiny_llama().state_dict())
    reporter = Reporter(show=False)
    changes = {"method": "svd", "output": str(tmp_path / "out"), "budget": {"keep": 0.9}}
    small = compress(recipe_from(settings(**changes)), reporter=reporter)
    assert loaded.notes[0] in reporter.notes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(again), logits(small.model))
    # Nearer to the model with its adapter than to the one without.
    found = logits(small.model)
    assert (found - expected).norm() < (found - logits(tiny_llama())).norm()


def test_an_adapter_that_cannot_be_merged_is_refused(adapted: Path, rankwise: Run) -> None:
    whole = (adapted / "adapter_config.json").read_text()
    for change in ({"r": 7}, {"target_modules": ["q_proj", "down_proj", "up_proj"]}, {"peft_type": "NEW"}):
        (adapted / "adapter_config.json").write_text(json.dumps({**json.loads(whole), **change}))
        failed(rankwise("generate", adapted, "--prompt", "x"), "adapter beside the weights", "move adapter_config.json")
    (adapted / "config.json").unlink()
    failed(rankwise("generate", adapted, "--prompt", "x"), "an adapter, not a model", "merge it first")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "something-new"])
def test_codes_of_others_are_refused_by_name(method: str, tiny: Path) -> None:
    change_config(tiny, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantised by {method}.*\n.*\n.*quantised from"):
        load_model(str(tiny))


def test_codes_in_fp8_are_turned_into_numbers(tiny: Path) -> None:
    pytest.importorskip("accelerate")
    expected = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if name.endswith("_proj.weight"):
                scale = weight.abs().max() / 448
                tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
                expected[name] = tensors[name].float() * scale

    change_weights(tiny, quantise)
    change_config(tiny, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = load_model(str(tiny))
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(loaded.model.get_parameter(name), weight, atol=1e-6, rtol=2**-7)
    assert not hasattr(loaded.model.config, "quantization_config")
    assert "fp8" in loaded.notes[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "describes otherwise"),
        ("lm_head.bias", "describes otherwise"),
        ("model.layers.0.mlp.extra_proj.weight", "describes otherwise"),
        ("model.layers.2.mlp.up_proj.weight", "2 blocks, .*layers.2.mlp.up_proj.weight. is of one after"),
    ],
)
def test_tensors_within_the_decoder_that_it_has_no_place_for_are_refused(name: str, says: str, tiny: Path) -> None:
    change_weights(tiny, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(ModelError, match=says) as raised:
        load_model(str(tiny))
    assert name in str(raised.value)


def test_a_config_of_fewer_layers_is_refused(tiny: Path) -> None:
    change_config(tiny, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"1 blocks, .*one after them"):
        load_model(str(tiny))
    change_config(tiny, num_hidden_layers=3)
    with pytest.raises(ModelError, match="lack"):
        load_model(str(tiny))


def test_other_tensors_are_noted_and_tables_are_not(tiny: Path) -> None:
    extra = {"score.weight": torch.zeros(2, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    change_weights(tiny, lambda tensors: tensors.update(extra))
    loaded = load_model(str(tiny))
    assert loaded.notes == ["1 tensors of the source are no part of the decoder and are left out: score.weight"]
    assert torch.equal(logits(loaded.model), logits(tiny_llama()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "chameleon"}, "loads chameleon as a model of images and text, and its config holds none"),
        ({"model_type": "idefics"}, "loads idefics as a model of images and text, and its config holds none"),
        ({"model_type": "qwen2_audio"}, r"qwen2_audio reads more than text \(audio\)"),
        ({"model_type": "granite_speech"}, r"granite_speech reads more than text \(sound\)"),
        ({"model_type": "florence2"}, "florence2 models are encoder-decoders"),
        ({"model_type": "t5gemma2"}, "t5gemma2 models are encoder-decoders"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no head for vit"),
    ],
)
def test_other_models_are_refused_for_what_they_are(changes: dict[str, Any], says: str, tiny: Path) -> None:
    (tiny / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ModelError, match=says):
        load_model(str(tiny))
