"""Embeddings and head in 8 bits: found out before anything slow, and stored last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.checkpoints import LoadedModel
from rankwise.device import summing_tolerance
from rankwise.errors import ModelError
from rankwise.layers import VocabularyParts, code_vocabulary, coded_bytes, decode_vocabulary, vocabulary_parts
from rankwise.progress import Reporter
from rankwise.recipes import Recipe
from rankwise.sizes import bytes_in_words


def chosen_vocabulary(recipe: Recipe, loaded: LoadedModel, probe: Tensor, reporter: Reporter) -> VocabularyParts | None:
    """What of the vocabulary a recipe stores in 8 bits, said and tried; None for nothing.

    Args:
        recipe: the whole run.
        loaded: the model; as it was afterwards.
        probe: a short token sequence, shape `[1, tokens]`, on the model's device.
        reporter: told about it.

    Raises:
        ModelError: when the model does with its embeddings or its head what codes cannot.
    """
    if recipe.embeddings is None and recipe.head is None:
        return None
    parts = vocabulary_parts(loaded.model, recipe.embeddings is not None, recipe.head is not None)
    _try(loaded.model, parts, probe)
    before = after = 0
    for name in parts.names(loaded.model):
        weight, width = loaded.model.get_parameter(name), loaded.stored_dtypes[name].itemsize
        before += weight.numel() * width
        after += coded_bytes(weight, width)
    what = "embeddings and head, which are one matrix," if parts.tied else "embeddings and head"
    what = what if parts.embedding and parts.head else "embeddings" if parts.embedding else "the head"
    verb = "is" if what == "the head" else "are"
    reporter.note(
        f"{what} {verb} stored in 8 bits, a scale a row: {bytes_in_words(before)} become {bytes_in_words(after)}; a "
        "budget of keep or bits is of the decoder's linear weights and counts neither"
    )
    return parts


@torch.no_grad()
def _try(model: object, parts: VocabularyParts, probe: Tensor) -> None:
    """Raise unless a model says with codes what it says with the numbers that they stand for."""
    run: torch.nn.Module = model  # type: ignore[assignment]
    reason = "it gives other logits than with the numbers that they stand for"
    replaced = code_vocabulary(model, parts)
    coded = None
    try:
        coded = run(input_ids=probe, use_cache=False).logits.float()
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        reason = f"its forward reads them in a way of its own ({type(problem).__name__})"
    finally:
        decode_vocabulary(model)
    if coded is not None:
        dense = run(input_ids=probe, use_cache=False).logits.float()
    for module, weight in replaced:
        module.weight = weight
    if coded is not None and float((coded - dense).norm()) <= summing_tolerance(run) * float(dense.norm()) + 1e-6:
        return
    raise ModelError(
        f"The vocabulary of {type(model).__name__} cannot be stored in 8 bits: {reason}.",
        where="embeddings, head",
        remedy="leave away --embeddings 8bit and --head 8bit",
    )


def bytes_of_vocabulary(loaded: LoadedModel, parts: VocabularyParts | None) -> Mapping[str, int]:
    """By name of each weight that becomes codes, what it takes then."""
    if parts is None:
        return {}
    model = loaded.model
    return {
        name: coded_bytes(model.get_parameter(name), loaded.stored_dtypes[name].itemsize) for name in parts.names(model)
    }


def store_vocabulary(loaded: LoadedModel, parts: VocabularyParts | None) -> None:
    """Round embeddings and head to 8 bits, of what they are stored as.

    Args:
        loaded: the model, every site stored; its embeddings and head are untied where they came to be on the way.
        parts: what `chosen_vocabulary` answered.

    Raises:
        NotFiniteError: naming a parameter that is beyond the range of its type.
    """
    if parts is None:
        return
    model = loaded.model
    loaded.to_stored_dtypes()
    for module, _ in code_vocabulary(model, vocabulary_parts(model, parts.embedding, parts.head)):
        loaded.settle(next(name for name, each in model.named_modules() if each is module))
    loaded.to_compute_dtypes()
