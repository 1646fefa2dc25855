"""Which of transformers' `Auto` classes loads a checkpoint, and what cannot be compressed, told from its config."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

from rankwise.errors import ModelError
from rankwise.models import has_own_language_model, language_model, text_config

_OTHERS = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
"""Kinds that read images, sound or both."""

_SENSES = ("vision_config", "audio_config", "speech_config", "image_config")


def auto_class(config: Any) -> Any:
    """The `Auto` class of a dense checkpoint: that for images and text where a language model is a part of it.

    Args:
        config: as transformers reads it, of no compressed checkpoint.
    """
    sees = config.model_type in SEEING and has_own_language_model(config)
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def require_causal(config: Any, source: str) -> None:
    """Raise unless the config is of a decoder that predicts the next token, alone or in a vision-language model.

    Raises:
        ModelError: saying what it is.
    """
    kind = config.model_type
    senses = [name.removesuffix("_config") for name in _SENSES if getattr(config, name, None) is not None]
    if getattr(config, "is_encoder_decoder", False) or getattr(text_config(config), "is_encoder_decoder", False):
        reason = f"{kind} models are encoder-decoders, whose decoder answers what an encoder read"
    elif auto_class(config) is AutoModelForImageTextToText:
        return
    elif kind in SEEING and (senses or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise ModelError(
            f"transformers loads {kind} as a model of images and text, and its config holds none of a language model "
            "alone, which would say what to compress.",
            where=source,
            remedy="save its decoder as a model of its own and give that",
        )
    elif senses or kind in _OTHERS:
        raise ModelError(
            f"{kind} reads more than text ({', '.join(senses) or 'sound'}), and transformers does not load it with "
            "AutoModelForImageTextToText, as it does the models whose language model is compressed in its place.",
            where=source,
            remedy="save its decoder as a model of its own and give that",
        )
    elif getattr(config, "auto_map", None):
        return
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = f"transformers has no head for {kind} models that predicts the next token"
    else:
        architectures = getattr(config, "architectures", None) or []
        if not architectures or set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(architectures):
            return
        reason = f"its architecture is {architectures[0]}"
    raise ModelError(
        f"This is not a causal language model: {reason}.",
        where=source,
        remedy="encoders and encoder-decoders cannot be compressed; give a decoder such as Llama, Qwen or GPT-2",
    )


def require_language_model(model: Any, source: str) -> None:
    """Raise unless the language model of a model that reads images lies where compressed layers can be built.

    Args:
        model: as it was loaded.
        source: for errors.

    Raises:
        ModelError: saying where it lies.
    """
    path, _ = language_model(model)
    if model.base_model is model or not path.startswith(f"{model.base_model_prefix}."):
        raise ModelError(
            f"The language model of {type(model).__name__} lies in {path or 'no module of its own'}, not within a base "
            "model that transformers loads by itself; compressed layers are built there.",
            where=source,
            remedy="save its language model as a model of its own and give that",
        )
