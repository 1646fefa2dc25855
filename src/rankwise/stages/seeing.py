"""Models that read images too: what of them is compressed, what stays, and which methods leave them as they are."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rankwise.checkpoints import LoadedModel, missing_processor
from rankwise.errors import ModelError
from rankwise.models import Site, beside_language_model, keeping_zeros, read_outside, reads_images, share_inputs
from rankwise.progress import Reporter
from rankwise.recipes import Recipe

_SHORT = 16
"""Tokens of a pass that only watches."""


def require_widths_kept(recipe: Recipe, loaded: LoadedModel) -> None:
    """Raise where a method changes widths of a model that reads images too.

    Raises:
        ModelError: naming the method.
    """
    if not recipe.method.prunes:
        return
    kind = type(loaded.model).__name__
    raise ModelError(
        f"{recipe.method.name} gives the decoder other widths, which a checkpoint says in the config of a model of "
        f"text alone; {kind} reads images too and holds the config of its decoder inside its own.",
        where=recipe.model,
        remedy="use a method that keeps widths, such as two_sided or quantize, or give its language model by itself",
    )


def sharing_sites(loaded: LoadedModel, found: list[Site], probe: Tensor) -> tuple[list[Site], list[str]]:
    """Sites that run, those that share an input marked, and the names of those whose weights the model's code reads.

    Args:
        loaded: the model.
        found: its sites.
        probe: token ids, shape `[1, tokens]`.

    Raises:
        ModelError: when a model that reads images too does not run without one.
    """

    def watched() -> tuple[list[Site], list[str]]:
        # First of all: some models change their weights before the first token that they see.
        read = read_outside(loaded.model, found, probe[:, :_SHORT])
        sites = share_inputs(loaded.model, [site for site in found if site.name not in read], probe)
        silent = keeping_zeros(loaded.model, sites, probe)
        return [replace(site, keeps_zeros=True) if site.name in silent else site for site in sites], read

    if not reads_images(loaded.model):
        return watched()
    try:
        return watched()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as problem:
        raise ModelError(
            f"{type(loaded.model).__name__} does not run on text alone ({type(problem).__name__}: {problem}).",
            where=loaded.source,
            remedy="calibration is on text: give its language model by itself",
        ) from problem


def say_what_stays(loaded: LoadedModel, sites: list[Site], reporter: Reporter) -> None:
    """Say how much of a model that reads images too is compressed, and what its source lacks.

    Raises:
        ModelError: naming a file of its processor that cannot be read.
    """
    total = sum(p.numel() for p in loaded.model.parameters())
    linear, beside = sum(site.parameters for site in sites), beside_language_model(loaded.model)
    reporter.note(
        f"{type(loaded.model).__name__} reads images too: {linear:,} of its {total:,} parameters "
        f"({linear / total:.0%}) are linear weights of the language model's decoder and are compressed on text alone; "
        f"{beside:,} ({beside / total:.0%}) lie outside the language model (vision tower, projector) and stay as they "
        "are"
    )
    if missing := missing_processor(loaded):
        reporter.note(missing)
