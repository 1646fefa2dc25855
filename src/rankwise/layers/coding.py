"""Whether embeddings and head of a model can be held in 8 bits, and how they are put there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankwise.errors import ModelError
from rankwise.layers.vocabulary import hold_embedding, hold_head, release_rows
from rankwise.quantizers.eight import eight_bits

GROUPS = 1
"""Groups of columns in a row that have a scale of their own: one a row, see docs/storage.md."""


@dataclass(frozen=True)
class VocabularyParts:
    """What of a vocabulary is held in 8 bits; one at least.

    Attributes:
        embedding: whether the embeddings are.
        head: whether the head is.
        tied: whether both are one matrix.
    """

    embedding: bool
    head: bool
    tied: bool

    def names(self, model: Any) -> list[str]:
        """Of a model that holds numbers, names of the weights that become codes; of tied ones the embeddings'."""
        wanted = [model.get_input_embeddings()] if self.embedding else []
        wanted += [model.get_output_embeddings()] if self.head and not self.tied else []
        return [f"{_path(model, module)}.weight" for module in wanted]


def coded_bytes(weight: torch.Tensor, number_bytes: int) -> int:
    """Bytes of a matrix in 8 bits, its scales counted as numbers of so many bytes."""
    rows, columns = weight.shape
    return rows * (columns + GROUPS * number_bytes)


def vocabulary_parts(model: Any, embedding: bool, head: bool) -> VocabularyParts:
    """What is held in 8 bits of a model that holds numbers, of tied weights both.

    Args:
        model: causal language model.
        embedding: whether its embeddings are wanted so.
        head: whether its head is.

    Raises:
        ModelError: naming what cannot be.
    """
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(looked_up, "weight", None)
    tied = read is not None and getattr(read, "weight", None) is weight
    parts = VocabularyParts(embedding or (head and tied), head or (embedding and tied), tied)
    if parts.embedding:
        inside = [name for name, module in model.base_model.named_modules() if module is looked_up]
        held = dict(looked_up.named_parameters(recurse=False))
        if not isinstance(looked_up, nn.Embedding) or not inside or set(held) != {"weight"} or looked_up.max_norm:
            raise _refusal(f"its embeddings are a {type(looked_up).__name__}", "embeddings", model)
    if parts.head and type(read) is not nn.Linear:
        raise _refusal(f"its head is a {type(read).__name__}", "head", model)
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if parts.embedding and len(owners) > 1 + tied:
        raise _refusal(f"its embeddings are {', '.join(owners)} at once", "embeddings", model)
    return parts


def _refusal(reason: str, where: str, model: Any) -> ModelError:
    return ModelError(
        f"The vocabulary of {type(model).__name__} cannot be stored in 8 bits: {reason}.",
        where=where,
        remedy=f"leave away --{where} 8bit",
    )


def code_vocabulary(model: Any, parts: VocabularyParts) -> list[tuple[Any, nn.Parameter]]:
    """Round embeddings and head to 8 bits, in place.

    Args:
        model: causal language model, in the types it is stored in.
        parts: which.

    Returns:
        What was replaced: modules, each with its weight, for `decode_vocabulary`.
    """
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    replaced = []
    for module, wanted in ((looked_up, parts.embedding), (read, parts.head)):
        if wanted:
            replaced.append((module, module.weight))
    if parts.embedding:
        hold_embedding(looked_up, *eight_bits(looked_up.weight.detach(), GROUPS))
    if parts.head and parts.tied:
        hold_head(read, None, None, looked_up)
        # They are one now by themselves, and no weights that loading would tie.
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    elif parts.head:
        hold_head(read, *eight_bits(read.weight.detach(), GROUPS))
    return replaced


def decode_vocabulary(model: Any, replaced: list[tuple[Any, nn.Parameter]] | None = None) -> None:
    """Let embeddings and head hold numbers again, in place; nothing is done where they do.

    Args:
        model: causal language model.
        replaced: what `code_vocabulary` returned, to be put back as it was; None for what the codes stand for.
    """
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    coded = [module for module in (looked_up, read) if hasattr(module, "rankwise_codes")]
    tied = read in coded and bool(read.tied)
    known = dict(replaced or ())
    values = {
        module: known[module] if module in known else nn.Parameter(module.weight, requires_grad=False)
        for module in coded
        if module is looked_up or not tied
    }
    for module in coded:
        release_rows(module, values[looked_up] if module is read and tied else values[module])
    if tied:
        model.config.tie_word_embeddings = True
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def vocabulary_entry(model: Any) -> dict[str, Any]:
    """What a config says of embeddings and head in 8 bits, as `code_head` reads it; empty without."""
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    entry: dict[str, Any] = {}
    if hasattr(looked_up, "rankwise_codes"):
        entry["embedding"] = {"path": _path(model.base_model, looked_up), "groups": looked_up.scale.shape[1]}
    if hasattr(read, "rankwise_codes"):
        own = {"tied": True} if read.tied else {"groups": read.scale.shape[1]}
        entry["head"] = {"path": _path(model, read), **own}
    return entry


def coded_buffers(model: Any) -> dict[str, torch.Tensor]:
    """By name, the codes of embeddings and head; those of tied ones once."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "rankwise_codes") and "codes" in module._buffers:
            found[f"{name}.codes"] = module.codes
    return found


def _path(model: Any, module: Any) -> str:
    return next(name for name, each in model.named_modules() if each is module)
