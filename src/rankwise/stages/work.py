"""The start of every run: texts, sites, and what is chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rankwise.allocation import Allocation, Looks, Problem, Spectral, UnitChoice
from rankwise.checkpoints import LoadedModel, fingerprint
from rankwise.data import Sequences, choose, load_sequences, parse_source, spread_first
from rankwise.errors import DataError, ModelError
from rankwise.evaluation import Objective
from rankwise.layers import VocabularyParts
from rankwise.models import (
    Site,
    find_sites,
    other_layers,
    reads_images,
    shared_layers,
    stacked_parameters,
    unfuse_experts,
)
from rankwise.progress import Reporter
from rankwise.recipes import Calibration, Evaluation, Recipe, Validation
from rankwise.reports import SearchSummary
from rankwise.runs import Crew, Run, Stage
from rankwise.sizes import Allowance, dense_candidate
from rankwise.stages.chosen import left_out, note_left_out
from rankwise.stages.memory import Need
from rankwise.stages.seeing import require_widths_kept, say_what_stays, sharing_sites
from rankwise.stages.vocabulary import bytes_of_vocabulary, chosen_vocabulary

_DEFAULT_LENGTH = 512

_PROBE = 64
"""Most tokens of a sequence on which something is tried."""

_HEADER = 120
"""Bytes that a tensor takes at most in the header of a file, beside its name."""

_PARTS_OF_A_SITE = 8
"""Tensors that a site is stored as at most."""


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
class Searched:
    """What a search of units found.

    Attributes:
        choice: how many stay, and how that came about.
        summary: what the search did, for the report.
    """

    choice: UnitChoice
    summary: SearchSummary


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
        problem: what the allocation chooses from: candidates, how they are stored, and what is allowed.
        stays: by coupling that lost units, those that stay; empty where none were taken out.
        memory: the way the model is held: `whole`, `blocks` or `disk`.
        need: what that was expected to take, where an estimate was made.
        smaller: hash of the weights after the model was made smaller; empty before, and where it is not.
        originals: by site name, `[m, n]` before the model was made smaller; empty where it is not.
        crew: workers elsewhere; None where this process does all.
        left_out: names of the sites that stay as they are, by the recipe's patterns.
        vocabulary: what of embeddings and head is stored in another form; None for nothing.
        searched: what a search of units found; None where there was none.
        judge: the validation objective of the model that was made smaller, by what it was before; None where nothing is
            judged, or the model has the size it had.
    """

    recipe: Recipe
    run: Run
    loaded: LoadedModel
    texts: Texts
    sites: list[Site]
    fingerprint: str
    reporter: Reporter
    problem: Problem
    memory: str = "whole"
    need: Need | None = None
    stays: Mapping[str, Tensor] = field(default_factory=dict)
    smaller: str = ""
    originals: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    crew: Crew | None = None
    left_out: frozenset[str] = frozenset()
    vocabulary: VocabularyParts | None = None
    searched: Searched | None = None
    judge: Objective | None = None

    @property
    def allocation(self) -> Allocation:
        """What spreads the size over the sites: where units were searched, the rest goes by estimated loss."""
        return self.recipe.allocation if self.searched is None else Spectral()

    @property
    def looks(self) -> Looks:
        """What the allocation looks at."""
        return self.allocation.looks

    @property
    def gradient_sequences(self) -> int:
        """At how many of the calibration sequences, the first, gradients are taken."""
        return self.recipe.calibration.gradients_at(len(self.texts.calibration.ids), self.loaded.model.device.type)

    def stage(self, name: str, depends_on: Mapping[str, Any]) -> Stage:
        """A stage of the run, whose notes and damages the reporter is told."""
        return self.run.stage(name, depends_on, self.reporter)


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
    first = recipe.calibration.gradients_at(len(calibration.ids), loaded.model.device.type)
    if first < len(calibration.ids):
        calibration = replace(calibration, ids=spread_first(calibration.ids, first))
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
        settings.model_copy(
            update={
                "source": source,
                "length": settings.length or recipe.calibration.length,
                "bos": recipe.calibration.bos,
            }
        ),
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
    return Sequences(chosen, f"{source} (not used for calibration)", int(unused.sum()), pool.cut, pool.bos)


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
        count=None if every else settings.counted(loaded.model.device.type),
        seed=seed if settings.sample == "random" else None,
        first=skip,
        start=settings.bos,
    )


def begin(
    recipe: Recipe,
    run: Run,
    loaded: LoadedModel,
    texts: Texts,
    reporter: Reporter,
    memory: str = "whole",
    need: Need | None = None,
) -> Work:
    """Find the sites and what they share, and say what is unusual about this run.

    Args:
        recipe: the whole run.
        run: where finished stages are.
        loaded: the model.
        texts: its token sequences.
        reporter: told about it.
        memory: the way the model is held.
        need: what that is expected to take.

    Raises:
        ModelError: when the model is compressed already, has no linear layers, or is one that the method cannot make
            smaller.
        RecipeError: when a pattern matches no site, or patterns leave none.
    """
    if hasattr(loaded.model.config, "rankwise"):
        raise ModelError("The model is compressed already.", where=recipe.model, remedy="compress the original")
    for note in loaded.notes:
        reporter.note(note)
    if reads_images(loaded.model):
        require_widths_kept(recipe, loaded)
    reporter.facts |= {"architecture": type(loaded.model).__name__, "run directory": str(run.directory)}
    # Of the weights as they are loaded, so that the same source is known again.
    mark = fingerprint(loaded.model, loaded.stored_dtypes)
    parts = unfuse_experts(loaded.model).parts
    loaded.stored_dtypes |= {part: loaded.stored_dtypes[whole] for part, whole in parts.items()}
    found = find_sites(loaded.model)
    for site in found:
        site.weight(loaded.model)
    probe = texts.calibration.ids[:1].to(loaded.model.device)
    sites, read = sharing_sites(loaded, found, probe)
    if read:
        reporter.note(
            f"{len(read)} linear layers stay dense, uncounted, because the model's own code reads their weights: "
            f"{', '.join(read[:3])}" + (", ..." if len(read) > 3 else "")
        )
    if reads_images(loaded.model):
        say_what_stays(loaded, sites, reporter)
    idle = len(found) - len(read) - len(sites)
    if idle:
        reporter.note(f"{idle} linear layers took no token of the first calibration sequence and stay dense, uncounted")
    why = "they make something else of their weights than W x + b"
    _note_dense(reporter, other_layers(loaded.model), why)
    _note_dense(reporter, shared_layers(loaded.model), "several blocks share their weights")
    stacked = stacked_parameters(loaded.model)
    if stacked:
        reporter.note(
            f"{stacked} parameters in stacks of matrices (experts, heads) stay dense and are not counted: "
            "their layout is none of those that are known"
        )
    calibration = texts.calibration
    asked = recipe.calibration.counted(loaded.model.device.type)
    if asked is not None and len(calibration.ids) < asked:
        reporter.note(
            f"the calibration source holds {len(calibration.ids)} sequences, fewer than the {asked} asked for"
        )
    if calibration.cut:
        reporter.note("the calibration source is very large; its first 64 million characters were read")
    names = left_out(sites, recipe.include, recipe.exclude)
    note_left_out(sites, names, reporter)
    vocabulary = chosen_vocabulary(recipe, loaded, probe[:, :_PROBE], reporter)
    whole = sum(site.parameters for site in sites)
    problem = problem_of(recipe, loaded, sites, whole, names, vocabulary)
    shared = (recipe, run, loaded, texts, sites, mark, reporter, problem, memory, need)
    return Work(*shared, left_out=names, vocabulary=vocabulary)


def _note_dense(reporter: Reporter, layers: Mapping[str, int], why: str) -> None:
    """Say which layers are no sites, given their parameters by name."""
    if layers:
        names = ", ".join(list(layers)[:3]) + (", ..." if len(layers) > 3 else "")
        reporter.note(
            f"{len(layers)} layers ({sum(layers.values())} parameters) stay dense, uncounted, because {why}: {names}"
        )


def problem_of(
    recipe: Recipe,
    loaded: LoadedModel,
    sites: list[Site],
    weights: int,
    left_out: frozenset[str],
    vocabulary: VocabularyParts | None,
) -> Problem:
    """Candidates of every site, without losses, and what they may take together.

    Args:
        recipe: the whole run.
        loaded: the model.
        sites: its sites.
        weights: numbers that the budget is of: those of the sites before units were taken out.
        left_out: names of the sites that stay as they are.
        vocabulary: what of embeddings and head is stored in another form.
    """
    method, budget = recipe.method, recipe.budget
    number_bits = 8 * max(loaded.stored_dtypes[f"{site.name}.weight"].itemsize for site in sites)
    form = method.form(budget, number_bits)
    by_shape = {
        shape: method.candidates(shape, form, budget.rank_multiple, recipe.allocation.looks >= Looks.LOSSES)
        for shape in dict.fromkeys((site.m, site.n) for site in sites)
    }
    whole = {(site.m, site.n): dense_candidate((site.m, site.n), form) for site in sites if site.name in left_out}
    candidates = {site.name: (whole if site.name in left_out else by_shape)[site.m, site.n] for site in sites}
    biased = [
        site
        for site in sites
        if method.adds_bias and not (site.has_bias or site.keeps_zeros) and site.name not in left_out
    ]
    allowance = Allowance(budget, weights, number_bits, _rest_bytes(loaded, sites, biased, vocabulary))
    if budget.size is not None:
        allowance.require(0, what="no weight at all and the rest of the model")
    return Problem(sites, candidates, form, allowance)


def _rest_bytes(loaded: LoadedModel, sites: list[Site], biased: list[Site], vocabulary: VocabularyParts | None) -> int:
    """Bytes of the weight files beside the sites' weights, those of biases that may be added and headers among them."""
    weights = {f"{site.name}.weight" for site in sites}
    coded = bytes_of_vocabulary(loaded, vocabulary)
    total = _HEADER
    for name, parameter in loaded.model.named_parameters():
        total += len(name) + _HEADER
        if name in coded:
            total += coded[name] + len(name) + _HEADER
        elif name not in weights:
            total += parameter.numel() * loaded.stored_dtypes[name].itemsize
    for site in sites:
        total += _PARTS_OF_A_SITE * (len(site.name) + _HEADER)
    return total + sum(site.m * loaded.stored_dtypes[f"{site.name}.weight"].itemsize for site in biased)
