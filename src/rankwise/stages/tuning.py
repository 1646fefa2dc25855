"""What each line of `finetune` does: a compressed checkpoint opened, trained, and written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoints import (
    REPORT_FILE,
    LoadedModel,
    fingerprint,
    load_model,
)
from rankwise.data import Examples, load_examples, parse_source
from rankwise.device import computing
from rankwise.errors import DataError, ModelError, RankwiseError
from rankwise.evaluation import Perplexity, perplexity
from rankwise.layers import is_linear, kind_of
from rankwise.models import Head, Site, places_of
from rankwise.progress import Reporter
from rankwise.recipes import Evaluation, FineTune
from rankwise.repair import Teacher, Training, mean_loss, steps_of, train
from rankwise.reports import (
    Report,
)
from rankwise.sizes import FULL_BITS, Plan, low_rank_candidates
from rankwise.stages.fitting import SiteFacts, store_layers
from rankwise.stages.work import read_sequences

Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""The sites' modules by name, and the values of all vectors."""


@dataclass(frozen=True)
class TuningExamples:
    """What a training learns from and what it is judged by.

    Attributes:
        learned: examples to learn from.
        judged: those held out.
        fingerprint: hash of all.
    """

    learned: Examples
    judged: Examples
    fingerprint: str


def read_results(source: Path) -> tuple[Report, Plan]:
    """The report and the plan in a directory that rankwise wrote.

    Raises:
        ModelError: when it is no such directory, or its report cannot be read or is of other sites than its plan.
        BudgetError: when its plan cannot be read.
    """
    report_file, plan_file = source / REPORT_FILE, source / "plan.json"
    if not (report_file.is_file() and plan_file.is_file()):
        raise ModelError(
            "This is no directory that rankwise compress wrote.",
            where=str(source),
            remedy=f"give the --output of a compression; it holds {report_file.name} and {plan_file.name}",
        )
    report, plan = Report.load(report_file), Plan.load(plan_file)
    shapes = {name: site.shape for name, site in report.sites.items()}
    for name in {**shapes, **plan.shapes}:
        if shapes.get(name) != plan.shapes.get(name):
            raise ModelError(
                f"The report and the plan beside it are of other sites: {name} differs.",
                where=str(source),
                remedy="bring back the two files as they were written together, or compress again",
            )
    return report, plan


def read_examples(wanted: FineTune, loaded: LoadedModel, reporter: Reporter) -> TuningExamples:
    """Tokenize the data, and keep the last examples to judge by.

    Raises:
        DataError: when there are too few.
    """
    length = wanted.length or min(512, loaded.context or 512)
    if loaded.context is not None and length > loaded.context:
        reporter.note(f"examples are cut to the context of {loaded.context} tokens, not {length}")
        length = loaded.context
    source = parse_source(wanted.data)
    found = load_examples(
        source,
        loaded.tokenizer,
        loaded.vocabulary,
        length=length,
        output_only=wanted.output_only,
        start=wanted.bos,
    )
    if found.shortened:
        reporter.note(f"{found.shortened} of {len(found)} examples were longer than {length} tokens: cut")
    if len(found) <= wanted.held_out:
        raise DataError(
            f"The data holds {len(found)} examples, and {wanted.held_out} are held out to judge by.",
            where=wanted.data,
            remedy="give more data, or a smaller --held-out",
        )
    held = wanted.held_out
    learned = Examples(found.ids[:-held], found.labels[:-held], found.source)
    return TuningExamples(learned, Examples(found.ids[-held:], found.labels[-held:], found.source), found.fingerprint)


def settings_of(wanted: FineTune, loaded: LoadedModel, examples: TuningExamples) -> dict[str, Any]:
    """All that a training depends on; flat, so that a difference can be named: --lr rather than "settings"."""
    settings = wanted.model_dump(mode="json", exclude={"settings"}) | wanted.training.model_dump(mode="json")
    settings["contents of the data"] = examples.fingerprint
    settings["weights of the model"] = fingerprint(loaded.model, loaded.stored_dtypes)
    return settings


def sites_of(loaded: LoadedModel, plan: Plan, method: str) -> list[Site]:
    """The sites of a compressed model, from the plan it was made with.

    Args:
        loaded: the model.
        plan: its plan.
        method: how it is to be trained.

    Raises:
        ModelError: when the model is not the one of the plan.
    """
    found, places = [], places_of(plan.shapes)
    for name, (m, n) in plan.shapes.items():
        try:
            module = loaded.model.get_submodule(name)
        except AttributeError:
            raise ModelError("The model lacks a layer of its plan.", where=f"{loaded.source}: {name}") from None
        same = is_linear(module) and kind_of(module).replaced != plan.cuts[name].dense
        if not same or kind_of(module).shape(module) != (m, n):
            raise ModelError("The model's layers are not those of its plan.", where=f"{loaded.source}: {name}")
        block, role = places[name]
        biased = any(key.endswith("bias") for key, _ in module.named_parameters())
        found.append(Site(name, role, block, m, n, kind_of(module).transposed, biased, name))
    if all(cut.dense for cut in plan.cuts.values()) and not (plan.stays and method == "lora"):
        raise ModelError(
            "Nothing in this model is factored.",
            where=loaded.source,
            remedy="what lost units alone takes --method lora" if plan.stays else "compress with a lower --keep",
        )
    return found


def counted(plan: Plan, loaded: LoadedModel) -> Plan:
    """The plan with the width of a number as the checkpoint has it, which plans of the first format did not say."""
    widths = []
    for name in plan.cuts:
        module = loaded.model.get_submodule(name)
        if kind_of(module).in_numbers:
            first = next(key for key, _ in module.named_parameters())
            widths.append(8 * loaded.stored_dtypes[f"{name}.{first}"].itemsize)
    width = max(widths, default=plan.form.number_bits)
    return plan.model_copy(update={"form": plan.form.model_copy(update={"number_bits": width})})


def parts_of(loaded: LoadedModel, sites: list[Site]) -> Parts:
    """The sites' modules, and the values of all vectors (norms among them): what training may change."""
    vectors = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.ndim == 1}
    return {site.name: site.module(loaded.model) for site in sites}, vectors


def put_back(
    wanted: FineTune, loaded: LoadedModel, parts: Parts, facts: Mapping[str, Any], reporter: Reporter
) -> SiteFacts:
    """Undo a training and say so: the model is again what was read.

    Returns:
        What reports say anew of each site's storage: nothing.
    """
    modules, vectors = parts
    for name, module in modules.items():
        loaded.model.set_submodule(name, module)
    for name, values in vectors.items():
        loaded.model.get_parameter(name).data = values
    reporter.note(
        f"the training was undone: the loss on {wanted.held_out} examples held out rose from "
        f"{facts['loss_before']:.4g} to {facts['loss_after']:.4g}; a lower --lr may help"
    )
    return {}


def open_factors(loaded: LoadedModel, sites: list[Site], training: Training) -> dict[str, torch.dtype]:
    """Make what is trained numbers in float32.

    Returns:
        By name of each site that holds numbers, the dtype they are stored in.

    Raises:
        RecipeError: when the training is not for this kind of checkpoint.
    """
    dtypes = {}
    for site in sites:
        module = site.module(loaded.model)
        if kind_of(module).replaced and kind_of(module).in_numbers:
            first = next(name for name, _ in module.named_parameters())
            dtypes[site.name] = loaded.stored_dtypes[f"{site.name}.{first}"]
    training.open(loaded.model, sites)
    return dtypes


def teacher_of(wanted: FineTune, report: Report, loaded: LoadedModel, device: Any, reporter: Reporter) -> Teacher:
    """The original model's predictions.

    Raises:
        ModelError: when it cannot be loaded, or has another vocabulary.
    """

    name = wanted.original or report.recipe.model
    try:
        original = load_model(
            name, precision=wanted.precision, device=device, trust_remote_code=wanted.trust_remote_code
        )
    except RankwiseError as problem:
        raise ModelError(
            f"The loss kl needs the original model, which cannot be loaded: {problem.problem}",
            where=name,
            remedy="give it with --original, or use --loss lm",
        ) from None
    if original.vocabulary != loaded.vocabulary:
        raise ModelError(
            f"The original predicts {original.vocabulary} tokens and the compressed model {loaded.vocabulary}.",
            where=name,
            remedy="give the model that was compressed with --original",
        )
    if fingerprint(original.model, original.stored_dtypes) != report.model_fingerprint:
        reporter.note(f"{name} has other weights than the model that was compressed")

    return Head(original.model, torch.zeros(1, 1, dtype=torch.long))


def judge_tuned(wanted: FineTune, loaded: LoadedModel, judged: Examples, teacher: Teacher | None) -> float:
    """The loss a token on the examples held out."""
    with computing(loaded.model):
        return mean_loss(loaded.model, judged, wanted.training, teacher)


def train_factors(
    wanted: FineTune,
    loaded: LoadedModel,
    sites: list[Site],
    plan: Plan,
    examples: Examples,
    teacher: Teacher | None,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Attach, train, fold in."""
    model, settings = loaded.model, wanted.training
    parameters = settings.attach(model, sites, wanted.seed)
    steps = steps_of(settings, len(examples))
    with reporter.counting(wanted.method, total=steps) as advance:
        history = train(
            model,
            parameters,
            examples,
            settings,
            teacher=teacher,
            folder=folder,
            seed=wanted.seed,
            reporter=reporter,
            step_done=lambda done, total, loss: advance(f"{wanted.method}: loss {loss:.4g}"),
        )
    # A site grows no further than to where the dense weight would be the smaller one.
    limits = {site.name: low_rank_candidates((site.m, site.n), plan.form, 1).largest_rank for site in sites}
    facts = settings.fold_in(model, sites, limits)
    return {"trained_parameters": sum(p.numel() for p in parameters.values()), "history": history, **facts}


def store_tuned(
    wanted: FineTune,
    loaded: LoadedModel,
    sites: list[Site],
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    probe: torch.Tensor,
    reporter: Reporter,
) -> tuple[Plan, SiteFacts]:
    """Bring what was trained into the form it is saved in.

    Returns:
        The plan of the model as it is then, and what reports say of each site's storage.
    """
    wanted.training.settle(loaded.model, sites)
    new = _plan_of(loaded, sites, plan)
    if new.kept_bits > plan.kept_bits:
        reporter.note(
            f"the model has grown: {new.bits_a_weight:.4f} bits a weight ({new.kept:.4f} of the linear weights), not "
            f"{plan.bits_a_weight:.4f} ({plan.kept:.4f}); merged adapters raise ranks, and L R trained beside codes "
            "stays at 16 bits (--set requantize=true brings it back to codes)"
        )
    stored = store_layers(loaded, sites, new.form, dtypes, probe, reporter)
    return new, {name: {"bits": new.site_bits(name), **stored.get(name, {})} for name in new.cuts}


def _plan_of(loaded: LoadedModel, sites: list[Site], plan: Plan) -> Plan:
    """The plan with the ranks the sites have now, and what of them are 16-bit numbers beside codes."""
    cuts, form = dict(plan.cuts), plan.form
    held = {
        site.name: kind_of(layer).factors(layer)
        for site in sites
        if kind_of(layer := site.module(loaded.model)).replaced
    }
    for name, factors in held.items():
        cuts[name] = replace(cuts[name], rank=factors.rank)
    coded = {name: factors for name, factors in held.items() if cuts[name].coded}
    if coded:
        signs = [factors.rotation.minus_in for factors in coded.values()]
        trained = any(each is not None and each.is_floating_point() for each in signs)
        # Cuts whose L R is at 16 bits have nothing but numbers anyway.
        full = max((f.full for name, f in coded.items() if cuts[name].lr_bits != FULL_BITS), default=0)
        form = form.model_copy(update={"full_rank": full, "trained_signs": trained})
    return plan.model_copy(update={"cuts": cuts, "form": form})


def score_tuned(wanted: FineTune, loaded: LoadedModel, reporter: Reporter) -> Perplexity | None:
    """Perplexity of the model as it stands; None when no text is given."""
    if wanted.evaluation is None:
        return None

    settings = Evaluation(source=wanted.evaluation, length=wanted.length, bos=wanted.bos)
    texts = read_sequences(settings, loaded, 0, 0)
    with computing(loaded.model):
        return perplexity(loaded.model, texts.ids, reporter=reporter, bos=texts.bos)
