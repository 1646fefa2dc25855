"""Configs of small models: what all families have in common, and what single families ask for beside it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "lru_width", "mamba_d_ssm"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "rotary_dim": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings of every family, as far as its config has them."""

LATENT: dict[str, Any] = {"num_key_value_heads": 4}
"""Latent attention has keys for each head."""

MIXED: dict[str, Any] = {**LATENT, "mlp_layer_types": ["dense", "sparse"]}

INDEXED: dict[str, Any] = {
    **MIXED,
    "layer_types": ["indexed_attention"] * 2,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
"""An indexer picks fewer tokens than a sequence has."""

TWO_KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}

SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
"""Blocks that share keys and values come after one of their own kind."""

PER_LAYER: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}

NOTE: dict[str, Any] = {
    **INDEXED,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
    "layer_types": ["indexed_attention", "sliding_attention"],
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "shared_experts_intermediate_size": 32,
}

IMAGES: dict[str, Any] = {"image_size": 28, "patch_size": 14, "crop_size": 28}

BYTES: dict[str, Any] = {"num_key_value_heads": 4, "intermediate_size": 64, "hidden_size_global": 64}

OWN: dict[str, dict[str, Any]] = {
    "axk1": MIXED,
    "axk2": INDEXED,
    "blt": {
        "encoder_hash_byte_group_vocab": 256,
        "encoder_config": {**BYTES, "vocab_size": 260},
        "decoder_config": {**BYTES, "vocab_size": 260},
        "global_config": {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4},
        "patcher_config": {"num_key_value_heads": 4, "vocab_size": 260},
    },
    "cohere_compass_text": {**TWO_KINDS, "rope_parameters": {"full_attention": None, "sliding_attention": None}},
    # Without clip_qkv the attention of this version calls clamp without a bound.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {}},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": INDEXED,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": NOTE,
    "dots3_note_text": NOTE,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon"}, "image_size": 28, "patch_size": 14, "image_token_id": 5},
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TWO_KINDS},
        "vision_config": {"model_type": "siglip_vision_model", **IMAGES},
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {**SHARED_KEYS, **PER_LAYER},
    "gemma4": {
        "text_config": {**SHARED_KEYS, **PER_LAYER, "global_head_dim": 16},
        "vision_config": {},
        "audio_config": {"hidden_size": 64, "subsampling_conv_channels": [8, 4], "output_proj_dims": 32},
    },
    "gemma4_text": {**SHARED_KEYS, **PER_LAYER, "global_head_dim": 16, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4_unified": {
        "text_config": {**SHARED_KEYS, "global_head_dim": 16},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 32},
    },
    "gemma4_unified_text": {**SHARED_KEYS, "global_head_dim": 16},
    "git": {"vision_config": IMAGES},
    "glm4_moe_lite": MIXED,
    "glm_moe_dsa": INDEXED,
    "got_ocr2": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**IMAGES, "output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [1]},
        "image_token_index": 5,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": {
        **MIXED,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts_per_token": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**LATENT, "moe_topk": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minicpm3": LATENT,
    "moss_transcribe_diarize": {
        "audio_config": {"max_source_positions": 16},
        "text_config": {"model_type": "qwen3"},
    },
    "phi4_multimodal": {
        "vision_config": IMAGES,
        "audio_config": {
            "num_blocks": 2,
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 32),
        },
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 8),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Settings that single families ask for beside the common ones, those of configs inside a config by its name."""


CANNOT = {
    "gemma3n": "its vision tower needs the package timm; its language model is gemma3n_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it reads hidden states, keys and values of the model that it helps, and cannot run on tokens alone",
    ),
    **dict.fromkeys(
        ("emu3", "mllama"),
        "its decoder alone is saved as a type that no auto class of transformers loads; the whole reads images",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "its auto class takes no config of the decoder alone, whose tokens are of several codebooks of sound",
    ),
}
"""Families of which no model can be built that is loaded again and runs on tokens alone, and why."""


def small_config(family: str) -> Any:
    """The config of a small model of a family.

    Raises:
        Exception: whatever the config says of settings that do not fit.
    """
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    return _fitted(kind.config_class, OWN.get(family, {}))


def _fitted(kind: Any, own: dict[str, Any]) -> Any:
    """A config of one class, and of configs within it those that `own` names."""
    if "model_type" in own:
        kind = CONFIG_MAPPING[own["model_type"]]
    own = {
        name: _fitted(kind.sub_configs[name], value) if name in kind.sub_configs else value
        for name, value in own.items()
        if name != "model_type"
    }
    known = _known(kind, own)
    return kind(**{**{name: value for name, value in SMALL.items() if name in known}, **own})


def _known(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    """All settings of a config; some classes have no config without settings."""
    try:
        return dict(kind().to_dict())
    except Exception:
        return dict(kind(**own).to_dict())
