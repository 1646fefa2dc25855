"""Whether embeddings and head of a model can be held in another form, and how they are put there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rankwise.errors import ModelError
from rankwise.layers.factored_head import factored_bytes, head_rank, multiply_head
from rankwise.layers.low_rank import LowRankLinear
from rankwise.layers.vocabulary import hold_embedding, hold_head, release_rows
from rankwise.quantizers.eight import eight_bits

GROUPS = 1
"""Groups of columns in a row that have a scale of their own: one a row, see docs/storage.md."""


@dataclass(frozen=True)
class VocabularyParts:
    """What of a vocabulary is held in another form; one part at least.

    Attributes:
        embedding: whether the embeddings are held in 8 bits.
        head: whether the head is.
        tied: whether both are one matrix.
        rank: of the two factors that the head is held as; None where it is not.
    """

    embedding: bool
    head: bool
    tied: bool
    rank: int | None = None

    @property
    def coded(self) -> bool:
        """Whether anything is held in 8 bits."""
        return self.embedding or self.head

    def stored_bytes(self, model: Any, widths: Mapping[str, int]) -> dict[str, int]:
        """Of a model that holds numbers, by name of each weight that is held otherwise what it takes then.

        Of tied ones the name is the embeddings'.

        Args:
            model: causal language model.
            widths: bytes of a number that is stored, by name of the weight.
        """
        found = {}
        if self.embedding:
            name = f"{_path(model, model.get_input_embeddings())}.weight"
            found[name] = coded_bytes(model.get_parameter(name), widths[name])
        if (self.head and not self.tied) or self.rank is not None:
            name = f"{_path(model, model.get_output_embeddings())}.weight"
            weight, width = model.get_parameter(name), widths[name]
            rank = self.rank
            found[name] = coded_bytes(weight, width) if rank is None else factored_bytes(weight.shape, rank, width)
        return found


def coded_bytes(weight: torch.Tensor, number_bytes: int) -> int:
    """Bytes of a matrix in 8 bits, its scales counted as numbers of so many bytes."""
    rows, columns = weight.shape
    return rows * (columns + GROUPS * number_bytes)


def vocabulary_parts(
    model: Any, embedding: bool, head: bool, keep: float | None = None, multiple: int = 1
) -> VocabularyParts:
    """What is held in another form of a model that holds numbers, of tied weights both.

    Args:
        model: causal language model.
        embedding: whether its embeddings are wanted in 8 bits.
        head: whether its head is.
        keep: fraction of the head's numbers that two factors in its place may have; None for no such factors.
        multiple: what their rank is a multiple of, where it is not smaller.

    Raises:
        ModelError: naming what cannot be.
    """
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(looked_up, "weight", None)
    tied = read is not None and getattr(read, "weight", None) is weight
    parts = VocabularyParts(embedding or (head and tied), head or (embedding and tied), tied)
    if keep is not None:
        parts = replace(parts, rank=_rank_of_head(model, tied, keep, multiple))
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


def _rank_of_head(model: Any, tied: bool, keep: float, multiple: int) -> int:
    """The rank of two factors in place of the head; raises as `vocabulary_parts` does."""
    read = model.get_output_embeddings()
    if tied:
        raise factors_refused(
            "it is one matrix with the embeddings, which would lose what it loses; beside whole embeddings two factors "
            "would make the model larger",
            model,
            "--head 8bit makes both smaller",
        )
    if type(read) is not nn.Linear:
        raise factors_refused(f"it is a {type(read).__name__}", model)
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is read.weight]
    if len(owners) > 1:
        raise factors_refused(f"its matrix is {', '.join(owners)} at once", model)
    return head_rank(read.weight.shape, keep, multiple)


def factors_refused(reason: str, model: Any, remedy: str = "leave away --head low-rank") -> ModelError:
    """An error that says why a model's head cannot be two factors."""
    return ModelError(
        f"The head of {type(model).__name__} cannot be stored as two factors: {reason}.", where="head", remedy=remedy
    )


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
    """Let embeddings and head hold their matrix again, in place; nothing is done where they do.

    Args:
        model: causal language model.
        replaced: what `code_vocabulary` returned, to be put back as it was; None for what the codes stand for.
    """
    multiply_head(model)
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
    """What a config says of embeddings and head in another form, as `code_head` reads it; empty without."""
    looked_up, read = model.get_input_embeddings(), model.get_output_embeddings()
    entry: dict[str, Any] = {}
    if hasattr(looked_up, "rankwise_codes"):
        entry["embedding"] = {"path": _path(model.base_model, looked_up), "groups": looked_up.scale.shape[1]}
    if hasattr(read, "rankwise_codes"):
        own = {"tied": True} if read.tied else {"groups": read.scale.shape[1]}
        entry["head"] = {"path": _path(model, read), **own}
    elif isinstance(read, LowRankLinear):
        entry["head"] = {"path": _path(model, read), **read.description()}
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
