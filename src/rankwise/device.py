"""The one place that asks which device to use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rankwise.errors import RecipeError

_PLANNED = ("cpu", "cuda", "mps")


def best_device() -> torch.device:
    """A GPU when PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1`, ... stands for.

    Raises:
        RecipeError: when PyTorch has no such device here.
    """
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise RecipeError(
            f"The device {name!r} cannot be used ({str(problem).splitlines()[0]}).",
            where="device",
            remedy="use auto or cpu",
        ) from None
    return device


def computed_on(model: Any) -> torch.device:
    """Where a model's blocks compute, wherever their weights lie: where its embeddings are."""
    embedding = model.get_input_embeddings()
    return next(iter((*embedding.parameters(), *embedding.buffers()))).device


def planned_device(name: str) -> torch.device:
    """The device that a name stands for, which need not be here; `auto` is what is here.

    Raises:
        RecipeError: for what names no device.
    """
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in _PLANNED:
        raise RecipeError(
            f"What a run needs on {name!r} is not known.",
            where="device",
            remedy="use auto, cpu, cuda or mps",
        )
    return device


def computed_type(model: Any) -> torch.dtype:
    """The type that a model's hidden states begin in: of its embeddings, or of what these give where they are codes."""
    embedding = model.get_input_embeddings()
    return getattr(embedding, "number_type", None) or embedding.weight.dtype


def summing_tolerance(model: Any) -> float:
    """Relative difference of logits that another order of summation may make; another use of a weight makes more."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(computed_type(model), 0.05)


def computing(model: Any) -> AbstractContextManager[Any]:
    """Autocast for a model that computes in less than float32 while its factors are held in float32."""
    dtype = computed_type(model)
    return torch.autocast(model.device.type, dtype) if dtype.itemsize == 2 else nullcontext()


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' if count != 1 else ''}"
