"""Models that read images beside text: where in them the language model lies, and what they read of an image."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(config: Any) -> Any:
    """What a model's config says of its language model: a config inside it, or where there is none (or several) itself.

    Args:
        config: of a model, dense or compressed.
    """
    try:
        return config.get_text_config()
    except ValueError:  # that there are several
        return config


def has_own_language_model(config: Any) -> bool:
    """Whether a model's config holds another one, of a decoder of text that is a part of the model.

    Args:
        config: of a model, dense or compressed; None where there is none.
    """
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return text_config(config) is not config


def language_model(model: Any) -> tuple[str, Any]:
    """The part of a model that decodes text, and its path.

    Args:
        model: causal language model, or one that reads images beside text, dense or compressed.

    Returns:
        Path and module; of a model of text alone an empty path and the model itself.
    """
    if not has_own_language_model(getattr(model, "config", None)):
        return "", model
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    return (path, decoder) if path else ("", model)


def reads_images(model: Any) -> bool:
    """Whether a language model is a part of a model that reads more than text."""
    return bool(language_model(model)[0])


def beside_language_model(model: nn.Module) -> int:
    """Parameters outside the language model and the head: vision tower, projector and whatever else there is."""
    inside = {id(p) for p in language_model(model)[1].parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside |= {id(p) for p in head.parameters()} if head is not None else set()
    return sum(p.numel() for p in model.parameters() if id(p) not in inside)
