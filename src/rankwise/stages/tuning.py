"""What each line of `finetune` does: a compressed checkpoint opened, trained, and written again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from rankwise.checkpoints import REPORT_FILE, LoadedModel, fingerprint, load_model, save_low_rank, writing
from rankwise.device import computing
from rankwise.errors import ModelError, RankwiseError, RecipeError, RunError
from rankwise.evaluation import perplexity
from rankwise.layers import FACTORED, REPLACED, LowRankLinear, QuantizedLinear, read_factors, substitute
from rankwise.models import Site, place_of
from rankwise.progress import Reporter
from rankwise.recipes import Evaluation
from rankwise.repair import (
    Lora,
    LowRankFactors,
    Subspace,
    Teacher,
    Training,
    attach_lora,
    attach_subspace,
    low_rank_parameters,
    merge_lora,
    merge_subspace,
    open_low_rank,
    steps_of,
    store_low_rank,
    train,
    trainable,
)
from rankwise.reports import can_draw, draw_losses, model_card
from rankwise.sizes import BitForm, Budget, RankPlan
from rankwise.stages.factors import store
from rankwise.stages.work import read_sequences

if TYPE_CHECKING:
    from rankwise.flows.finetune import FineTune

SETTINGS_FILE = "settings.json"
_REPORT_KEYS = {"recipe", "model_fingerprint", "keep", "sites", "notes", "before", "after"}


def report_of(source: Path, name: str) -> dict[str, Any]:
    """The report in a directory that rankwise wrote.

    Raises:
        ModelError: when it is no such directory.
    """
    try:
        found = json.loads((source / name).read_text())
        if isinstance(found, dict) and set(found) >= _REPORT_KEYS and (source / "plan.json").is_file():
            return found
    except (OSError, ValueError):
        pass
    raise ModelError(
        "This is no directory that rankwise compress wrote.",
        where=str(source),
        remedy=f"give the --output of a compression; it holds {name} and plan.json",
    )


def same_settings(folder: Path, settings: Mapping[str, Any], restart: bool) -> None:
    """Refuse to go on with a training that was begun with other settings.

    Raises:
        RunError: naming the settings that differ.
    """
    file = folder / SETTINGS_FILE
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    if file.exists():
        begun = json.loads(file.read_text())
        differing = sorted(key for key in {*begun, *settings} if begun.get(key) != settings.get(key))
        if differing:
            raise RunError(
                f"A training for this output was begun with other settings: {', '.join(differing)}.",
                where=str(folder),
                remedy="use the same settings to go on, add --restart to begin anew, or give another --output",
            )


def _shape_of(module: Any) -> tuple[int, ...]:
    """m and n of a layer, dense or factored."""
    if isinstance(module, REPLACED):
        return module.out_features, module.in_features
    shape = tuple(module.weight.shape)
    return shape[::-1] if isinstance(module, Conv1D) else shape


def sites_of(loaded: LoadedModel, plan: RankPlan) -> list[Site]:
    """The sites of a compressed model, from the plan it was made with.

    Raises:
        ModelError: when the model is not the one of the plan.
    """
    found = []
    for name, (m, n) in plan.shapes.items():
        try:
            module = loaded.model.get_submodule(name)
        except AttributeError:
            raise ModelError("The model lacks a layer of its plan.", where=f"{loaded.source}: {name}") from None
        if isinstance(module, REPLACED) == (plan.ranks[name] is None) or _shape_of(module) != (m, n):
            raise ModelError("The model's layers are not those of its plan.", where=f"{loaded.source}: {name}")
        block, role = place_of(name)
        biased = any(key.endswith("bias") for key, _ in module.named_parameters())
        found.append(Site(name, role, block, m, n, isinstance(module, Conv1D), biased, name))
    if all(rank is None for rank in plan.ranks.values()):
        raise ModelError(
            "Nothing in this model is factored.", where=loaded.source, remedy="compress with a lower --keep"
        )
    return found


def parts_of(loaded: LoadedModel, sites: list[Site]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The sites' modules, and the values of all vectors (norms among them): what training may change."""
    vectors = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.ndim == 1}
    return {site.name: site.module(loaded.model) for site in sites}, vectors


def put_back(loaded: LoadedModel, modules: Mapping[str, Any], vectors: Mapping[str, torch.Tensor]) -> None:
    """Undo a training: the model is again what was read."""
    for name, module in modules.items():
        loaded.model.set_submodule(name, module)
    for name, values in vectors.items():
        loaded.model.get_parameter(name).data = values


def open_factors(loaded: LoadedModel, sites: list[Site], plan: RankPlan, training: Training) -> dict[str, torch.dtype]:
    """Turn every factored layer into two factors in float32, components in order of size.

    Of a quantised layer only the part of L R that is trained is turned.

    Returns:
        By site name, the dtype it is stored in.

    Raises:
        RecipeError: when the training is not for this kind of checkpoint.
    """
    quantised = any(isinstance(site.module(loaded.model), QuantizedLinear) for site in sites)
    if quantised != isinstance(training, LowRankFactors):
        raise RecipeError(
            "The checkpoint is quantised." if quantised else "The checkpoint is not quantised.",
            where=loaded.source,
            remedy="use --method lowrank" if quantised else "use --method full-factors, subspace or lora",
        )
    if isinstance(training, LowRankFactors):
        assert plan.form is not None
        opened = open_low_rank(loaded.model, sites, plan.form, training)
        if not low_rank_parameters(loaded.model, sites, training.signs and opened.trained_signs):
            raise RecipeError(
                "There is nothing to train: no site has L R.",
                where=loaded.source,
                remedy="compress with --method caldera and a rank, or train the rotation: --set signs=true",
            )
        return {}
    dtypes = {}
    for site in sites:
        module = site.module(loaded.model)
        if isinstance(module, FACTORED):
            first = next(name for name, _ in module.named_parameters())
            dtypes[site.name] = loaded.stored_dtypes[f"{site.name}.{first}"]
            factors = read_factors(module)
            substitute(loaded.model, site, factors.reduced(factors.rank)[0], torch.float32)
    return dtypes


def teacher_of(
    wanted: FineTune, report: Mapping[str, Any], loaded: LoadedModel, device: Any, reporter: Reporter
) -> Teacher:
    """The original model's predictions.

    Raises:
        ModelError: when it cannot be loaded, or has another vocabulary.
    """

    name = wanted.original or report["recipe"]["model"]
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
    if fingerprint(original.model, original.stored_dtypes) != report["model_fingerprint"]:
        reporter.note(f"{name} has other weights than the model that was compressed")

    def predict(ids: Any, mask: Any) -> Any:
        return original.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    return predict


def train_factors(
    wanted: FineTune,
    loaded: LoadedModel,
    sites: list[Site],
    plan: RankPlan,
    examples: Any,
    teacher: Teacher | None,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Attach, train, merge."""

    model, settings = loaded.model, wanted.training
    if isinstance(settings, Subspace):
        parameters = attach_subspace(model, sites, settings)
    elif isinstance(settings, Lora):
        parameters = attach_lora(model, sites, settings, wanted.seed)
    elif isinstance(settings, LowRankFactors):
        parameters = low_rank_parameters(model, sites, settings.signs)
    else:
        parameters = trainable(model, sites, settings.norms)
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
            step_done=lambda done, total, loss: advance(f"{wanted.method}: loss {loss:.4g}"),
        )
    facts: dict[str, Any] = {
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "history": history,
    }
    if isinstance(settings, LowRankFactors) and settings.requantize:
        # Before the training is judged: what is judged is what will be stored.
        store_low_rank(model, sites, form_of(loaded, sites, plan), True)
    if isinstance(settings, Subspace):
        merge_subspace(model, sites)
    elif isinstance(settings, Lora):
        # A site grows no further than to where the dense weight would be the smaller one.
        budget = Budget(keep=None, rank_multiple=1, storage=plan.storage)
        limits = {site.name: budget.largest_rank(site) for site in sites}
        facts["norm_lost_in_merging"] = merge_lora(model, sites, settings.merge, limits)
    return facts


def store_tuned(
    wanted: FineTune,
    loaded: LoadedModel,
    sites: list[Site],
    plan: RankPlan,
    dtypes: Mapping[str, torch.dtype],
    probe: torch.Tensor,
    reporter: Reporter,
) -> tuple[RankPlan, Mapping[str, Mapping[str, Any]]]:
    """Bring what was trained into the form it is saved in.

    Returns:
        The plan of the model as it is then, and what reports say of each site's storage.
    """
    training = wanted.training
    if not isinstance(training, LowRankFactors):
        plan = plan_of(loaded, sites, plan, reporter)
        return plan, store(loaded, sites, plan, dtypes, probe, reporter)
    assert plan.form is not None
    loaded.to_stored_dtypes()
    opened = form_of(loaded, sites, plan)
    form = store_low_rank(loaded.model, sites, opened, training.requantize)
    loaded.to_compute_dtypes()
    new = plan.model_copy(update={"form": form})
    if new.bits_a_weight > plan.bits_a_weight:
        reporter.note(
            f"what was trained is stored at 16 bits: {new.bits_a_weight:.4f} bits a weight, not "
            f"{plan.bits_a_weight:.4f} (--set requantize=true brings L and R back to codes)"
        )
    return new, {site.name: {"bits": new.site_bits(site.name)} for site in sites if site.name in plan.q_bits}


def form_of(loaded: LoadedModel, sites: list[Site], plan: RankPlan) -> BitForm:
    """How the model's quantised layers are made up now."""
    assert plan.form is not None
    layers = [layer for site in sites if isinstance(layer := site.module(loaded.model), QuantizedLinear)]
    full = max(layer.form["full"] for layer in layers)
    return plan.form.model_copy(
        update={"full_rank": full, "trained_signs": any(layer.form["trained_signs"] for layer in layers)}
    )


def plan_of(loaded: LoadedModel, sites: list[Site], plan: RankPlan, reporter: Reporter) -> RankPlan:
    """The plan with the ranks the sites have now; says so when they grew."""

    ranks = {
        site.name: module.right.out_features if isinstance(module := site.module(loaded.model), LowRankLinear) else None
        for site in sites
    }
    new = plan.model_copy(update={"ranks": ranks})
    if new.kept_parameters > plan.kept_parameters:
        reporter.note(
            f"merging the adapters raised the ranks: kept are {new.kept:.4f} of the linear weights, not {plan.kept:.4f}"
        )
    return new


def score_tuned(wanted: FineTune, loaded: LoadedModel, reporter: Reporter) -> dict[str, Any] | None:
    """Perplexity of the model as it stands; None when no text is given."""
    if wanted.evaluation is None:
        return None

    settings = Evaluation(source=wanted.evaluation, length=wanted.length)
    ids = read_sequences(settings, loaded, 0, 0).ids
    with computing(loaded.model):
        return asdict(perplexity(loaded.model, ids, reporter=reporter))


def write_tuned(
    report: dict[str, Any],
    output: Path,
    loaded: LoadedModel,
    sites: list[Site],
    plan: RankPlan,
    stored: Mapping[str, Mapping[str, Any]],
    costs: tuple[Any, Any],
    facts: dict[str, Any],
    reporter: Reporter,
) -> dict[str, Any]:
    """Write the checkpoint; the report is the compression's, brought up to date, with what training did."""
    loaded.to_stored_dtypes()
    per_site = {
        name: {**entry, "rank": plan.ranks[name], **stored.get(name, {})} for name, entry in report["sites"].items()
    }
    new = {
        **report,
        "keep": {**report["keep"], "got": plan.kept},
        "bits": {**report["bits"], "got": plan.bits_a_weight} if plan.q_bits else None,
        "after": asdict(costs[1]),
        "evaluation": None,
        "sites": per_site,
        "notes": [*report["notes"], *reporter.notes],
        "finetune": [*report.get("finetune", []), {**facts, "cost_before": asdict(costs[0])}],
        "stages": dict(reporter.stages),
    }
    with writing(output) as folder:
        save_low_rank(folder, loaded, sites, report["recipe"]["max_shard_size"])
        new["bytes_on_disk"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        (folder / REPORT_FILE).write_text(json.dumps(new, indent=2) + "\n")
        (folder / "plan.json").write_text(plan.model_dump_json(indent=2) + "\n")
        if can_draw():
            draw_losses(folder / "finetune.svg", {facts["settings"]["method"]: facts["history"]})
        (folder / "README.md").write_text(model_card(new))
    return new
