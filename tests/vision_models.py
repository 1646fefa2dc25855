"""Tiny vision-language models with random weights, and what prepares images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from rankwise.quickstart import MODEL

IMAGE = 2048
"""The token that stands for a patch of an image, the first after the vocabulary of the bundled tokenizer."""

_TEXT: dict[str, Any] = {
    "vocab_size": 2056,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.1,
}
_QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "depth": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TURNED = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 2049, "vision_start_token_id": 2050, "vision_end_token_id": 2051}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **_TOWER}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **_TEXT, **changes}


def _qwen(kind: str, tower: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"text_config": _text(f"{kind}_text", **_TURNED, **changes), "vision_config": {**_QWEN, **tower}, **_TOKENS}


_DEEP = {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_id": IMAGE, "image_seq_length": 4},
    "gemma3": {
        "text_config": _text("gemma3_text"),
        "vision_config": _SIGLIP,
        "image_token_id": IMAGE,
        "boi_token_index": 2049,
        "eoi_token_index": 2050,
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": _qwen("qwen2_5_vl", {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}),
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 12},
        "image_token_id": IMAGE,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    "qwen2_vl": _qwen("qwen2_vl", {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen3_vl": _qwen("qwen3_vl", _DEEP),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe", _DEEP, **_MOE),
    "idefics3": {"text_config": _text("llama"), "vision_config": _TOWER, "image_token_id": IMAGE, "scale_factor": 2},
    "smolvlm": {"text_config": _text("llama"), "vision_config": _TOWER, "image_token_id": IMAGE, "scale_factor": 2},
    "paligemma": {
        "text_config": _text("gemma"),
        "vision_config": _SIGLIP,
        "image_token_id": IMAGE,
        "projection_dim": 32,
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {"model_type": "internvl_vision", **_TOWER, "image_size": [16, 16], "patch_size": [8, 8]},
        "image_token_id": IMAGE,
        "image_seq_length": 1,
    },
    "llava_next": {
        "text_config": _text("llama"),
        "vision_config": _CLIP,
        "image_token_id": IMAGE,
        "image_grid_pinpoints": [[16, 16]],
    },
}
"""Settings by model type."""


def tiny_seeing(kind: str) -> Any:
    """A random vision-language model, whose images make a difference."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **FAMILIES[kind])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # which Gemma 3 begins with zeros
            parameter.data.normal_(0, 0.3)
    return model


def save_seeing(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write such a model."""
    tiny_seeing(kind).to(dtype).save_pretrained(folder)
    return folder


def llava_processor() -> Any:
    """A processor for the tiny LLaVA: images of 16 x 16, four tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "of the tokenizer {{ messages }}"
    tokenizer.add_tokens("<image>", special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template="of the processor {{ messages }}",
    )
