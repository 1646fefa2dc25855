"""The start of every run: texts, sites, and what the results of stages depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from rankwise.checkpoints import LoadedModel, fingerprint
from rankwise.data import Sequences, choose, load_sequences, parse_source
from rankwise.device import best_device
from rankwise.errors import DataError, ModelError, RecipeError
from rankwise.models import Site, find_sites, fused_expert_parameters, share_inputs
from rankwise.progress import Reporter
from rankwise.recipes import Calibration, Evaluation, Recipe, Validation
from rankwise.runs import Run
from rankwise.sizes import BitBudget, Budget

_STAGE_FORMAT = 5
"""Raised when the contents or the arithmetic of a stage change, so that old stages are not taken for new ones."""

_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Texts:
    """Token sequences of a run.

    Attributes:
        calibration: for statistics.
        validation: for a search, before any selection; None when there is none.
        evaluation: for scores; None when there are none.
    """

    calibration: Sequences
    validation: Sequences | None
    evaluation: Sequences | None


@dataclass(frozen=True)
class Work:
    """What all stages share.

    Attributes:
        recipe: the whole run.
        run: where finished stages are.
        loaded: the model.
        texts: its token sequences.
        sites: its linear weights.
        fingerprint: hash of its weights.
        reporter: told about progress.
        dense_bits: bits of a weight as the checkpoint stores it.
    """

    recipe: Recipe
    run: Run
    loaded: LoadedModel
    texts: Texts
    sites: list[Site]
    fingerprint: str
    reporter: Reporter
    dense_bits: int

    @property
    def budget(self) -> Budget:
        """What ranks are chosen on: the recipe's, as the method counts it."""
        budget = self.recipe.method.budget(self.recipe.budget)
        if not isinstance(budget, BitBudget):
            return budget
        return budget.model_copy(update={"dense_bits": self.dense_bits})


def device_of(recipe: Recipe) -> torch.device:
    """The device a recipe names.

    Raises:
        RecipeError: when PyTorch has no such device here.
    """
    if recipe.device == "auto":
        return best_device()
    try:
        device = torch.device(recipe.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise RecipeError(
            f"The device {recipe.device!r} cannot be used ({str(problem).splitlines()[0]}).",
            where="device",
            remedy="use auto or cpu",
        ) from None
    return device


def sequence_length(settings: Calibration | Validation | Evaluation, context: int | None) -> int | None:
    """Tokens a sequence: what is asked, else 512 or the context if shorter, else a `tokens:` file's own.

    Raises:
        DataError: when more is asked than the model's context.
    """
    assert settings.source is not None
    if settings.length is None:
        ready_made = parse_source(settings.source).kind == "tokens"
        return None if ready_made else min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and settings.length > context:
        raise DataError(
            f"Sequences of {settings.length} tokens are longer than the model's context of {context}.",
            where=settings.source,
            remedy=f"use a length of at most {context}",
        )
    return settings.length


def read_texts(recipe: Recipe, loaded: LoadedModel, reporter: Reporter, validate: bool) -> Texts:
    """Tokenize calibration, validation and evaluation text, before anything slow starts.

    Args:
        recipe: says which.
        loaded: has the tokenizer.
        reporter: told when validation and calibration overlap.
        validate: whether validation text is needed.

    Raises:
        DataError: when a source cannot be read or holds too little.
    """
    calibration = read_sequences(recipe.calibration, loaded, recipe.seed, skip=0)
    validation = _read_validation(recipe, loaded, calibration, reporter) if validate else None
    if not validate and recipe.validation.source is not None:
        reporter.note(f"the validation text is not used: the allocation {recipe.allocation.name} searches nothing")
    scored = recipe.evaluation
    evaluation = None if scored is None else read_sequences(scored, loaded, scored.seed, scored.skip)
    return Texts(calibration, validation, evaluation)


def _read_validation(recipe: Recipe, loaded: LoadedModel, calibration: Sequences, reporter: Reporter) -> Sequences:
    """Validation sequences; those in common with calibration are said, or left out when no source is given."""
    settings = recipe.validation
    used = {row.numpy().tobytes() for row in calibration.ids}
    if settings.source is not None:
        read = read_sequences(settings, loaded, recipe.seed, settings.skip)
        shared = sum(row.numpy().tobytes() in used for row in read.ids)
        if shared:
            reporter.note(
                f"{shared} of {len(read.ids)} validation sequences are calibration sequences too: a search will "
                "favour what fits the calibration text"
            )
        return read
    source = recipe.calibration.source
    pool = read_sequences(
        settings.model_copy(update={"source": source, "length": settings.length or recipe.calibration.length}),
        loaded,
        recipe.seed,
        settings.skip,
        every=True,
    )
    unused = torch.tensor([row.numpy().tobytes() not in used for row in pool.ids])
    wanted = settings.sequences if settings.sequences is not None else int(unused.sum())
    chosen = choose(pool.ids[unused], wanted, recipe.seed if settings.sample == "random" else None)
    if len(chosen) < max(1, wanted):
        raise DataError(
            f"The calibration source has {len(chosen)} sequences that calibration does not use, and validation needs "
            f"{max(1, wanted)}.",
            where=source,
            remedy="give --validation SOURCE, more text, or fewer calibration sequences",
        )
    return Sequences(chosen, f"{source} (not used for calibration)", int(unused.sum()), pool.cut)


def read_sequences(
    settings: Calibration | Validation | Evaluation, loaded: LoadedModel, seed: int, skip: int, every: bool = False
) -> Sequences:
    """Tokenize one source as its settings say, or `every` sequence of it; errors as for `read_texts`."""
    assert settings.source is not None
    return load_sequences(
        parse_source(settings.source),
        loaded.tokenizer,
        loaded.vocabulary,
        length=sequence_length(settings, loaded.context),
        count=None if every else settings.sequences,
        seed=seed if settings.sample == "random" else None,
        first=skip,
    )


def begin(recipe: Recipe, run: Run, loaded: LoadedModel, texts: Texts, reporter: Reporter) -> Work:
    """Find the sites and what they share, and say what is unusual about this run.

    Raises:
        ModelError: when the model is compressed already or has no linear layers.
    """
    if hasattr(loaded.model.config, "rankwise"):
        raise ModelError("The model is compressed already.", where=recipe.model, remedy="compress the original")
    found = find_sites(loaded.model)
    for site in found:
        site.weight(loaded.model)
    probe = texts.calibration.ids[:1].to(loaded.model.device)
    sites = share_inputs(loaded.model, found, probe)
    idle = len(found) - len(sites)
    if idle:
        reporter.note(f"{idle} linear layers took no token of the first calibration sequence and stay dense, uncounted")
    fused = fused_expert_parameters(loaded.model)
    if fused:
        reporter.note(f"{fused} parameters of fused experts (3-D tensors) stay dense and are not counted in the budget")
    calibration = texts.calibration
    asked = recipe.calibration.sequences
    if asked is not None and len(calibration.ids) < asked:
        reporter.note(
            f"the calibration source holds {len(calibration.ids)} sequences, fewer than the {asked} asked for"
        )
    if calibration.cut:
        reporter.note("the calibration source is very large; its first 64 million characters were read")
    dense_bits = 8 * max(loaded.stored_dtypes[f"{site.name}.weight"].itemsize for site in sites)
    mark = fingerprint(loaded.model, loaded.stored_dtypes)
    return Work(recipe, run, loaded, texts, sites, mark, reporter, dense_bits)


def model_key(work: Work) -> dict[str, Any]:
    return {
        "format": _STAGE_FORMAT,
        "model": work.fingerprint,
        "precision": str(next(work.loaded.model.parameters()).dtype),
        "device": work.loaded.model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def calibration_key(work: Work) -> dict[str, Any]:
    calibration = {"ids": work.texts.calibration.fingerprint, "batch_size": work.recipe.calibration.batch_size}
    return {**model_key(work), "calibration": calibration, "seed": work.recipe.seed}
