"""The flow of fine-tuning: compressed checkpoint -> factors -> training -> merged -> checkpoint of the same kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rankwise.errors import DataError, ModelError, RankwiseError, RunError
from rankwise.recovery import FullFactors, Lora, Subspace

if TYPE_CHECKING:
    import torch

    from rankwise.budget import RankPlan
    from rankwise.checkpoints import LoadedModel
    from rankwise.progress import Reporter
    from rankwise.recovery import Teacher
    from rankwise.sites import Site

_SETTINGS = "settings.json"

METHODS: dict[str, type[Subspace | Lora | FullFactors]] = {
    "subspace": Subspace,
    "lora": Lora,
    "full-factors": FullFactors,
}


class FineTune(BaseModel):
    """A fine-tuning of a compressed checkpoint.

    Attributes:
        model: directory that rankwise wrote.
        data: text source; `alpaca:FILE.jsonl` for instructions.
        output: directory to write.
        method: `subspace`, `lora` or `full-factors`.
        settings: of the method.
        length: most tokens an example; None means the smaller of 512 and the model's context.
        output_only: learn from the outputs of instructions alone.
        original: the model that was compressed, for the loss `kl`; None takes the one the report names.
        held_out: examples at the end that are not learned from: what is trained is judged on them.
        evaluation: text source to score before and after.
        seed: for the order of examples.
        device: `auto`, `cpu`, `cuda`, ...
        precision: as in a recipe.
        trust_remote_code: run code that the original ships.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: str
    output: str
    method: Literal["subspace", "lora", "full-factors"] = "full-factors"
    settings: Subspace | Lora | FullFactors = FullFactors()
    length: Annotated[int, Field(ge=2)] | None = None
    output_only: bool = False
    original: str | None = None
    held_out: Annotated[int, Field(ge=1)] = 16
    evaluation: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "stored", "float32"] = "auto"
    trust_remote_code: bool = False


def finetune(wanted: FineTune, *, restart: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Fine-tune a compressed model and write it as a checkpoint of the same kind.

    A killed training goes on from its last checkpoint when the same call is made again.

    Args:
        wanted: the whole run.
        restart: throw away what an earlier training for this output left.
        reporter: told about stages, progress and notes.

    Returns:
        The report that is written with the checkpoint.

    Raises:
        RankwiseError: for anything the user can mend.
    """
    from rankwise import stages
    from rankwise.budget import RankPlan
    from rankwise.checkpoints import REPORT_FILE, check_output, load_model
    from rankwise.data import Examples, load_examples, parse_source
    from rankwise.device import computing
    from rankwise.evaluation import measure_cost
    from rankwise.progress import Reporter
    from rankwise.recipe import Recipe
    from rankwise.recovery import mean_loss

    reporter = reporter or Reporter(show=False)
    source, output = Path(wanted.model), Path(wanted.output)
    check_output(output)
    report = _report_of(source, REPORT_FILE)
    plan = RankPlan.load(source / "plan.json")
    folder = output.absolute().with_name(f".{output.name}.training")
    with reporter.stage("load"):
        device = stages.device_of(Recipe(model=wanted.model, device=wanted.device))
        loaded = load_model(wanted.model, precision=wanted.precision, device=device)
        length = wanted.length or min(512, loaded.context or 512)
        if loaded.context is not None and length > loaded.context:
            reporter.note(f"examples are cut to the context of {loaded.context} tokens, not {length}")
            length = loaded.context
        examples = load_examples(
            parse_source(wanted.data),
            loaded.tokenizer,
            loaded.vocabulary,
            length=length,
            output_only=wanted.output_only,
        )
        if examples.shortened:
            reporter.note(f"{examples.shortened} of {len(examples)} examples were longer than {length} tokens: cut")
        if len(examples) <= wanted.held_out:
            raise DataError(
                f"The data holds {len(examples)} examples, and {wanted.held_out} are held out to judge by.",
                where=wanted.data,
                remedy="give more data, or a smaller --held-out",
            )
        learned = Examples(examples.ids[: -wanted.held_out], examples.labels[: -wanted.held_out], examples.source)
        judged = Examples(examples.ids[-wanted.held_out :], examples.labels[-wanted.held_out :], examples.source)
        # Flat, so that a difference can be named: --lr rather than "settings".
        settings = wanted.model_dump(mode="json", exclude={"settings"}) | wanted.settings.model_dump(mode="json")
        settings["contents of the data"] = examples.fingerprint
        _same_settings(folder, settings, restart)
        sites = sites_of(loaded, plan)
        before = measure_cost(loaded.model, sites, loaded.stored_dtypes)
        dtypes = _open_factors(loaded, sites)
        teacher = _teacher(wanted, report, device, reporter) if wanted.settings.loss == "kl" else None
    scores: list[dict[str, Any] | None] = [None, None]
    with reporter.stage("evaluate before"):
        scores[0] = _score(wanted, loaded, reporter)
        with computing(loaded.model):
            start = mean_loss(loaded.model, judged, wanted.settings, teacher)
    with reporter.stage(f"train {wanted.method}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2))
        facts = _train(wanted, loaded, sites, plan, learned, teacher, folder, reporter)
        with computing(loaded.model):
            after = mean_loss(loaded.model, judged, wanted.settings, teacher)
        facts |= {"loss_before": start, "loss_after": after, "accepted": after < start}
        if not facts["accepted"]:
            facts["undo"]()
            reporter.note(
                f"the training was undone: the loss on {len(judged)} examples held out rose from {start:.4g} to "
                f"{after:.4g}; a lower --lr may help"
            )
        del facts["undo"]
    with reporter.stage("storage"):
        plan = _plan_of(loaded, sites, plan, reporter)
        stored = stages.store(loaded, sites, plan, dtypes, examples.ids[0][None, :64], reporter)
    cost = measure_cost(loaded.model, sites, loaded.stored_dtypes)
    with reporter.stage("evaluate after"):
        scores[1] = _score(wanted, loaded, reporter)
    facts = {
        "settings": wanted.model_dump(mode="json"),
        "examples": {"count": len(learned), "held_out": len(judged), "tokens": learned.tokens},
        "before": scores[0],
        "after": scores[1],
        **facts,
    }
    with reporter.stage("checkpoint"):
        new = _write(report, output, loaded, sites, plan, stored, (before, cost), facts, reporter)
    shutil.rmtree(folder, ignore_errors=True)
    return new


def _report_of(source: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((source / name).read_text())
        if isinstance(found, dict) and (source / "plan.json").is_file():
            return found
    except (OSError, ValueError):
        pass
    raise ModelError(
        "This is no directory that rankwise compress wrote.",
        where=str(source),
        remedy=f"give the --output of a compression; it holds {name} and plan.json",
    )


def _same_settings(folder: Path, settings: Mapping[str, Any], restart: bool) -> None:
    """Refuse to go on with a training that was begun with other settings."""
    file = folder / _SETTINGS
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


def sites_of(loaded: LoadedModel, plan: RankPlan) -> list[Site]:
    """The sites of a compressed model, from the plan it was made with.

    Raises:
        ModelError: when the model is not the one of the plan.
    """
    from transformers.pytorch_utils import Conv1D

    from rankwise.layers import FACTORED
    from rankwise.sites import Site, place_of

    found = []
    for name, (m, n) in plan.shapes.items():
        try:
            module = loaded.model.get_submodule(name)
        except AttributeError:
            raise ModelError("The model lacks a layer of its plan.", where=f"{loaded.source}: {name}") from None
        if isinstance(module, FACTORED) == (plan.ranks[name] is None):
            raise ModelError("The model's layers are not those of its plan.", where=f"{loaded.source}: {name}")
        block, role = place_of(name)
        biased = any(key.endswith("bias") for key, _ in module.named_parameters())
        found.append(Site(name, role, block, m, n, isinstance(module, Conv1D), biased, name))
    return found


def _open_factors(loaded: LoadedModel, sites: list[Site]) -> dict[str, torch.dtype]:
    """Turn every factored layer into two factors in float32, components in order of size.

    Returns:
        By site name, the dtype it is stored in.
    """
    import torch

    from rankwise.layers import FACTORED, read_factors, substitute

    dtypes = {}
    for site in sites:
        module = site.module(loaded.model)
        if isinstance(module, FACTORED):
            first = next(name for name, _ in module.named_parameters())
            dtypes[site.name] = loaded.stored_dtypes[f"{site.name}.{first}"]
            factors = read_factors(module)
            substitute(loaded.model, site, factors.reduced(factors.rank)[0], torch.float32)
    return dtypes


def _teacher(wanted: FineTune, report: Mapping[str, Any], device: Any, reporter: Reporter) -> Teacher:
    """The original model's predictions."""
    from rankwise.checkpoints import fingerprint, load_model

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
    if fingerprint(original.model, original.stored_dtypes) != report["model_fingerprint"]:
        reporter.note(f"{name} has other weights than the model that was compressed")

    def predict(ids: Any, mask: Any) -> Any:
        return original.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    return predict


def _train(
    wanted: FineTune,
    loaded: LoadedModel,
    sites: list[Site],
    plan: RankPlan,
    examples: Any,
    teacher: Teacher | None,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Attach, train, merge. The facts hold `undo`, which puts the factors back as they were."""
    from rankwise.budget import Budget
    from rankwise.layers import LowRankLinear, read_factors, substitute
    from rankwise.recovery import attach_lora, attach_subspace, merge_lora, merge_subspace, train, trainable

    model, settings = loaded.model, wanted.settings
    old = {s.name: read_factors(s.module(model)) for s in sites if isinstance(s.module(model), LowRankLinear)}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 1}

    def undo() -> None:
        for site in sites:
            if site.name in old:
                substitute(model, site, old[site.name])
        for name, parameter in model.named_parameters():
            if name in others and others[name].shape == parameter.shape:
                parameter.data.copy_(others[name])

    if isinstance(settings, Subspace):
        parameters = attach_subspace(model, sites, settings)
    elif isinstance(settings, Lora):
        parameters = attach_lora(model, sites, settings, wanted.seed)
    else:
        parameters = trainable(model, sites, settings.norms)
    steps = max(1, round(settings.epochs * len(examples) / settings.batch_size))
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
        "undo": undo,
    }
    if isinstance(settings, Subspace):
        merge_subspace(model, sites)
    elif isinstance(settings, Lora):
        # A site grows no further than to where the dense weight would be the smaller one.
        budget = Budget(keep=None, rank_multiple=1, storage=plan.storage)
        limits = {site.name: budget.largest_rank(site) for site in sites}
        facts["norm_lost_in_merging"] = merge_lora(model, sites, settings.merge, limits)
    return facts


def _plan_of(loaded: LoadedModel, sites: list[Site], plan: RankPlan, reporter: Reporter) -> RankPlan:
    """The plan with the ranks the sites have now; says so when they grew."""
    from rankwise.layers import LowRankLinear

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


def _score(wanted: FineTune, loaded: LoadedModel, reporter: Reporter) -> dict[str, Any] | None:
    if wanted.evaluation is None:
        return None
    from dataclasses import asdict

    from rankwise.device import computing
    from rankwise.evaluation import perplexity
    from rankwise.recipe import Evaluation
    from rankwise.stages import read_sequences

    settings = Evaluation(source=wanted.evaluation, length=wanted.length)
    ids = read_sequences(settings, loaded, 0, 0).ids
    with computing(loaded.model):
        return asdict(perplexity(loaded.model, ids, reporter=reporter))


def _write(
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
    from dataclasses import asdict

    from rankwise.checkpoints import REPORT_FILE, save_low_rank, writing
    from rankwise.reports import can_draw, draw_losses, model_card

    loaded.to_stored_dtypes()
    per_site = {
        name: {**entry, "rank": plan.ranks[name], **stored.get(name, {})} for name, entry in report["sites"].items()
    }
    new = {
        **report,
        "keep": {**report["keep"], "got": plan.kept},
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
