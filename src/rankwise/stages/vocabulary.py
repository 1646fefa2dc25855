"""Embeddings and head in another form: found out before anything slow; those in 8 bits are stored last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.checkpoints import LoadedModel
from rankwise.device import summing_tolerance
from rankwise.errors import ModelError
from rankwise.factors import Factors
from rankwise.layers import (
    VocabularyParts,
    code_vocabulary,
    decode_vocabulary,
    factors_refused,
    substitute,
    vocabulary_parts,
)
from rankwise.progress import Reporter
from rankwise.recipes import Recipe
from rankwise.sizes import bytes_in_words


def chosen_vocabulary(recipe: Recipe, loaded: LoadedModel, probe: Tensor, reporter: Reporter) -> VocabularyParts | None:
    """What of the vocabulary a recipe stores in another form, said and tried; None for nothing.

    Args:
        recipe: the whole run.
        loaded: the model; as it was afterwards.
        probe: a short token sequence, shape `[1, tokens]`, on the model's device.
        reporter: told about it.

    Raises:
        ModelError: when the model does with its embeddings or its head what codes or factors cannot.
    """
    if recipe.embeddings is None and recipe.head is None:
        return None
    model, coded = loaded.model, recipe.head == "8bit"
    keep, multiple = recipe.head_keep, recipe.budget.rank_multiple
    parts = vocabulary_parts(model, recipe.embeddings is not None, coded, keep, multiple)
    if parts.coded:
        _try_codes(model, parts, probe)
        _say_codes(loaded, replace(parts, rank=None), reporter)
    if parts.rank is not None:
        _try_factors(model, parts.rank, probe)
        alone = VocabularyParts(False, False, parts.tied, parts.rank)
        reporter.note(
            f"the head is stored as two factors of rank {parts.rank}: {_become(loaded, alone)}; a budget of keep or "
            "bits is of the decoder's linear weights and does not count it"
        )
    return parts


def _become(loaded: LoadedModel, parts: VocabularyParts) -> str:
    """Bytes before and after, in words."""
    after = bytes_of_vocabulary(loaded, parts)
    before = sum(loaded.model.get_parameter(name).numel() * loaded.stored_dtypes[name].itemsize for name in after)
    return f"{bytes_in_words(before)} become {bytes_in_words(sum(after.values()))}"


def _say_codes(loaded: LoadedModel, parts: VocabularyParts, reporter: Reporter) -> None:
    """Say what is stored in 8 bits, and what that takes."""
    what = "embeddings and head, which are one matrix," if parts.tied else "embeddings and head"
    what = what if parts.embedding and parts.head else "embeddings" if parts.embedding else "the head"
    verb = "is" if what == "the head" else "are"
    reporter.note(
        f"{what} {verb} stored in 8 bits, a scale a row: {_become(loaded, parts)}; a budget of keep or bits is of the "
        "decoder's linear weights and counts neither"
    )


def _try_codes(model: Any, parts: VocabularyParts, probe: Tensor) -> None:
    """Raise unless a model says with codes what it says with the numbers that they stand for."""

    def put() -> Callable[[], None]:
        replaced = code_vocabulary(model, parts)

        def back() -> None:
            for module, weight in replaced:
                module.weight = weight

        return back

    if reason := _against(model, probe, put):
        raise ModelError(
            f"The vocabulary of {type(model).__name__} cannot be stored in 8 bits: {reason}.",
            where="embeddings, head",
            remedy="leave away --embeddings 8bit and --head 8bit",
        )


def _try_factors(model: Any, rank: int, probe: Tensor) -> None:
    """Raise unless a model says with a head of two factors what it says with the matrix that they make."""

    def put() -> Callable[[], None]:
        plain: nn.Linear = model.get_output_embeddings()
        path = next(name for name, each in model.named_modules() if each is plain)
        weight, bias = plain.weight.detach(), plain.bias
        # Some columns of the head as they are, and nothing of the others.
        right = torch.eye(rank, weight.shape[1], dtype=weight.dtype, device=weight.device)
        factors = Factors(weight[:, :rank], right, None if bias is None else bias.detach())
        substitute(model, path, factors, "two_factor", weight.dtype)
        return lambda: model.set_submodule(path, plain)

    if reason := _against(model, probe, put):
        raise factors_refused(reason, model)


@torch.no_grad()
def _against(model: Any, probe: Tensor, put: Callable[[], Callable[[], None]]) -> str:
    """Why a model does not say in another form what it says with the numbers that this stands for; empty where it does.

    Args:
        model: as it was afterwards.
        probe: a short token sequence, shape `[1, tokens]`.
        put: brings it into that form; what it answers puts back what was there.
    """
    reason = "it gives other logits than with the numbers that they stand for"
    back = put()
    coded = None
    try:
        coded = model(input_ids=probe, use_cache=False).logits.float()
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        reason = f"its forward reads them in a way of its own ({type(problem).__name__})"
    finally:
        decode_vocabulary(model)
    if coded is not None:
        dense = model(input_ids=probe, use_cache=False).logits.float()
    back()
    same = coded is not None and float((coded - dense).norm()) <= summing_tolerance(model) * float(dense.norm()) + 1e-6
    return "" if same else reason


def bytes_of_vocabulary(loaded: LoadedModel, parts: VocabularyParts | None) -> Mapping[str, int]:
    """By name of each weight that becomes codes or factors, what it takes then."""
    if parts is None:
        return {}
    return parts.stored_bytes(loaded.model, {name: dtype.itemsize for name, dtype in loaded.stored_dtypes.items()})


def store_vocabulary(loaded: LoadedModel, parts: VocabularyParts | None) -> None:
    """Round embeddings and head to 8 bits, of what they are stored as.

    Args:
        loaded: the model, every site stored; its embeddings and head are untied where they came to be on the way.
        parts: what `chosen_vocabulary` answered.

    Raises:
        NotFiniteError: naming a parameter that is beyond the range of its type.
    """
    if parts is None or not parts.coded:
        return
    model = loaded.model
    loaded.to_stored_dtypes()
    for module, _ in code_vocabulary(model, vocabulary_parts(model, parts.embedding, parts.head)):
        loaded.settle(next(name for name, each in model.named_modules() if each is module))
    loaded.to_compute_dtypes()
