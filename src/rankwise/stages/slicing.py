"""Slicing: the residual stream of the whole model is cut before anything else is done to its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from safetensors.torch import load_file, save_file

from rankwise.checkpoints import fingerprint
from rankwise.errors import BudgetError, ModelError, NotFiniteError, RecipeError
from rankwise.layers.narrowing import accepts_width, slice_by_one_rotation, slice_with_adapters
from rankwise.layers.stream_form import check_form
from rankwise.methods import SliceGPT
from rankwise.models import BlockRunner, PreNorm, find_sites, share_inputs
from rankwise.sizes import Allowance, StreamSizes
from rankwise.stages.keys import calibration_key
from rankwise.stages.work import Work

_FILE = "directions.safetensors"


def kept_width(work: Work, form: PreNorm) -> int:
    """The largest k that the budget allows.

    Args:
        work: the run, its model dense.
        form: what the model is made of.

    Raises:
        BudgetError: saying what has to be kept at least.
    """
    method, allowance = work.recipe.method, work.problem.allowance
    assert isinstance(method, SliceGPT)
    sizes, adapters = StreamSizes.of(work.sites, form), not method.plain
    widths = list(sizes.widths(method.multiple))
    if method.plain:
        widths = [k for k in widths if accepts_width(work.loaded.model.config, k)]
    if not widths:
        raise BudgetError(
            f"No multiple of {method.multiple} is a width that {type(work.loaded.model).__name__} may have.",
            where="method.multiple",
            remedy="lower it, or take --set method.adapters=full",
        )

    def allowed(k: int) -> Allowance:
        return replace(allowance, rest_bytes=allowance.rest_bytes + _grown_beside(work, form, k))

    least = widths[-1]
    allowed(least).require(
        sizes.numbers(least, adapters) * allowance.number_bits,
        what=f"{least} of {form.width} coordinates of the residual stream",
    )
    found = sizes.largest(lambda k: allowed(k).bits // allowance.number_bits, widths, adapters)
    assert found is not None
    return found


def _grown_beside(work: Work, form: PreNorm, kept: int) -> int:
    """Bytes that embeddings, head and biases take more with k coordinates kept; less than none where they shrink.

    Embeddings are cut, a head that shared one gets numbers of its own, and readers get biases from norms that shift.
    """
    model, dtypes = work.loaded.model, work.loaded.stored_dtypes
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    name = next(name for name, p in model.named_parameters() if p is embedding)
    plain = getattr(work.recipe.method, "plain", False)
    before = len(embedding) * form.width + (0 if head is embedding else len(head) * form.width)
    after = len(embedding) * kept + len(head) * (kept if plain else form.width)
    tables: list[Any] = [model.base_model.get_submodule(path) for path in form.tables]
    after -= sum(len(table.weight) for table in tables) * (form.width - kept)
    after += sum(site.m for site in work.sites if site.name.endswith(tuple(f".{path}" for path in form.biased)))
    return (after - before) * dtypes[name].itemsize


def check_slicing(work: Work) -> None:
    """Find out before anything slow whether a model is one that can be sliced, and how far.

    Raises:
        ModelError: naming the architecture, where it cannot be sliced, or not to a plain checkpoint.
        BudgetError: saying what has to be kept at least.
        RecipeError: when the model is not held whole, or cannot be written as asked.
    """
    model, recipe = work.loaded.model, work.recipe
    assert isinstance(recipe.method, SliceGPT)
    if work.memory != "whole":
        raise RecipeError(
            f"Slicing needs a model that is whole in memory, not held by {work.memory}.",
            where="memory",
            remedy="give --memory whole, or a method of low rank",
        )
    if recipe.format == "dense" and not recipe.method.plain:
        raise RecipeError(
            "A plain checkpoint has no place for the adapters of a sliced model.",
            where="format",
            remedy="give --set method.adapters=none, or leave out --format dense",
        )
    form = PreNorm.of(model, work.sites)
    if recipe.method.plain and not form.plain:
        name = type(model).__name__
        raise ModelError(
            f"{name} cannot be sliced to a plain checkpoint: its norms subtract a mean, or its attention and MLP stand "
            "side by side.",
            where=name,
            remedy="give --set method.adapters=full",
        )
    check_form(model, form, work.texts.calibration.ids[:1, :64].to(model.device))
    kept_width(work, form)


def slice_residual(work: Work) -> Work:
    """Cut the residual stream of the model in place.

    Returns:
        The run with the smaller model's sites, which stay as they are now.

    Raises:
        NotFiniteError: when the stream holds NaN or an infinity.
    """
    method, loaded = work.recipe.method, work.loaded
    assert isinstance(method, SliceGPT)
    model, calibration = loaded.model, work.texts.calibration.ids
    form = PreNorm.of(model, work.sites)
    kept = kept_width(work, form)
    allowance = work.problem.allowance
    allowance = replace(allowance, rest_bytes=allowance.rest_bytes + _grown_beside(work, form, kept))
    embedding = loaded.stored_dtypes[
        next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    ]
    key = {**calibration_key(work), "method": method.model_dump(exclude={"multiple"}), "kept": kept}
    stage = work.stage("slicing", key)
    known = {name: q.double() for name, q in load_file(stage.folder / _FILE).items()} if stage.taken_over() else {}
    fresh = not known
    runner = BlockRunner(model, calibration, work.recipe.calibration.batch_size, autocast=False)
    cut = slice_by_one_rotation if method.plain else slice_with_adapters

    def track(steps: Sequence[int]) -> Iterable[int]:
        return work.reporter.track(steps, "slicing", total=len(steps))

    try:
        cut(model, form, kept, runner, method.tokens, known, track)
    except ValueError as problem:
        raise NotFiniteError(
            f"The residual stream cannot be decomposed ({problem}).",
            where="slicing",
            remedy="--set precision=float32 if the model overflows in half precision",
        ) from None
    if fresh:
        with stage.making() as folder, folder.writing(_FILE) as path:
            save_file({name: q.float().contiguous() for name, q in known.items()}, path)
    # What was tied, or is new, is stored as the embeddings are.
    loaded.stored_dtypes = {name: loaded.stored_dtypes.get(name, embedding) for name, _ in model.named_parameters()}
    # The numbers of a checkpoint are those that are scored and written.
    loaded.to_stored_dtypes()
    loaded.to_compute_dtypes()
    sites = share_inputs(model, find_sites(model), calibration[:1].to(model.device))
    left = replace(
        work.problem,
        sites=sites,
        allowance=allowance,
        candidates={site.name: method.candidates((site.m, site.n), work.problem.form, 1, False) for site in sites},
    )
    work.reporter.note(f"the residual stream keeps {kept} of {form.width} coordinates")
    return replace(
        work,
        sites=sites,
        problem=left,
        smaller=fingerprint(model, loaded.stored_dtypes),
        originals={site.name: (site.m, site.n) for site in work.sites},
    )
