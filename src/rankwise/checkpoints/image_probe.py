"""A random image as a model that reads images takes it, found by trying the forms that there are.

Nothing of a processor is needed, which may not be there: sizes are in the config of the vision tower, and how many
tokens an image becomes is what the model itself makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rankwise.models import reads_images

_AROUND = 4
"""Tokens of text before and after the image."""

_SIDE = 4
"""Patches (merged ones, where they are merged) on a side of an image whose size is free."""


@torch.no_grad()
def image_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward pass over some text with a random image in it.

    Args:
        model: in memory, in evaluation mode.
        ids: token ids to take the text from, shape `[1, tokens]`.

    Returns:
        `input_ids` and what the vision tower reads, on the model's device; empty where the model reads no images, or
        takes them in none of the forms tried here: one image of the tower's size, alone or as the only tile of a list,
        with and without its size in pixels; or patches in rows with the grid that they are of.
    """
    token = _image_token(model.config)
    if not reads_images(model) or token is None or not hasattr(model, "get_image_features"):
        return {}
    text = ids[:1, : 2 * _AROUND].to(model.device)
    text = text[text != token][None]
    for image in _forms(model):
        try:
            count = _tokens_of(model, image)
            inside = text.new_full((1, count), token)
            tokens = torch.cat([text[:, :_AROUND], inside, text[:, _AROUND:]], dim=1)
            given = {"input_ids": tokens, **image}
            if "mm_token_type_ids" in _arguments(model.forward):
                given["mm_token_type_ids"] = (tokens == token).long()
            seen = model(**given, use_cache=False).logits
            given["pixel_values"] = -image["pixel_values"]
            if torch.isfinite(seen).all() and not torch.equal(model(**given, use_cache=False).logits, seen):
                return given
        except Exception:  # whatever a model raises at a form that is not its own
            continue
    return {}


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _tokens_of(model: Any, image: dict[str, Tensor]) -> int:
    """How many tokens a model makes of an image."""
    found = model.get_image_features(**image)
    found = getattr(found, "pooler_output", found)
    if isinstance(found, tuple | list):
        return sum(each.numel() // each.shape[-1] for each in found)
    return int(found.numel() // found.shape[-1])


def _forms(model: Any) -> Iterator[dict[str, Tensor]]:
    """Random images in every form that is known."""
    vision = next(
        (found for name in ("vision_config", "vision_tower") if (found := getattr(model.config, name, None))), 0
    )
    patch, channels = _side(vision, "patch_size", 14), _number(vision, ("num_channels", "in_channels", "in_chans"), 3)
    merge = _number(vision, ("spatial_merge_size",), 0) or _number(model.config, ("spatial_merge_size",), 1)
    source = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return torch.randn(shape, generator=source).to(model.device, kind)

    asked = _arguments(model.get_image_features) | _arguments(model.forward)
    if "image_grid_thw" in asked:
        side, frames = _SIDE * merge, _number(vision, ("temporal_patch_size",), 1)
        grid = torch.tensor([[1, side, side]], device=model.device)
        yield {"pixel_values": noise(side * side, channels * frames * patch * patch), "image_grid_thw": grid}
        return
    own = _side(vision, "image_size", 0)
    sizes = [_SIDE * merge * patch, own] if "image_sizes" in asked else [own or _SIDE * merge * patch]
    for side in filter(None, sizes):
        pixels = torch.tensor([[side, side]], device=model.device)
        for lead in ((1,), (1, 1), (1, 2)):
            image = {"pixel_values": noise(*lead, channels, side, side)}
            if "image_sizes" in asked:
                yield {**image, "image_sizes": pixels}
            yield image


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), default)


def _side(config: Any, name: str, default: int) -> int:
    found = getattr(config, name, default)
    return int(found[0] if isinstance(found, tuple | list) else found)
