"""Repair: steps after the factors, each a stage, judged by the validation objective and undone where they harm."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.data import Examples, load_examples, parse_source
from rankwise.device import computing
from rankwise.evaluation import Objective
from rankwise.layers import kind_of
from rankwise.linalg import OutputMetric
from rankwise.models import BlockRunner, Head, Logits, Original, Site, allocate
from rankwise.repair import (
    Training,
    block_parameters,
    refit_block,
    steps_of,
    train,
    train_block,
)
from rankwise.reports import RepairStep
from rankwise.runs import Folder
from rankwise.sizes import Plan
from rankwise.stages.keys import chosen_key
from rankwise.stages.outlooks import Outlooks
from rankwise.stages.planning import objective_key, select_samples
from rankwise.stages.work import Work, sequence_length
from rankwise.statistics import SiteStatistics, Store

_FACTORS = "factors.safetensors"


@dataclass
class Repairing:
    """What the steps of a repair share.

    Attributes:
        original: the dense modules and norms.
        objective: judges the model as it stands.
        key: all that the factors depend on, step by step.
        metric_of: the method's metric on a site's outputs, or None.
        done: what each step did, for the report.
    """

    original: Original
    objective: Objective
    key: dict[str, Any]
    metric_of: Callable[[Site], OutputMetric | None]
    done: list[RepairStep] = field(default_factory=list)


def prepare_repair(work: Work, store: Store, outlooks: Outlooks, plan: Plan) -> Repairing | None:
    """Remember the original, while the model is still dense; None when nothing is to be repaired."""
    if not work.recipe.repair.steps:
        return None
    samples = select_samples(work, outlooks)
    objective = work.judge or Objective(
        work.loaded.model, samples, work.recipe.objective, lambda _cuts: None, work.recipe.validation.batch_size
    )
    key = {
        **objective_key(work, samples),
        "plan": plan.model_dump(mode="json", include={"cuts", "form"}),
        "method": work.recipe.method.model_dump(),
        "steps": [],
        **chosen_key(work),
    }
    if work.judge is not None:
        key["judged_by"] = work.fingerprint
    original = Original.of(work.loaded.model, work.sites)

    def metric_of(site: Site) -> OutputMetric | None:
        dense: Any = original.modules[site.name]
        weight = (dense.weight.T if site.transposed else dense.weight).double().cpu()
        bias = None if dense.bias is None else dense.bias.cpu()
        return work.recipe.method.output_metric(SiteStatistics(site, weight, bias, store))

    return Repairing(original, objective, key, metric_of)


def check_repair(work: Work) -> None:
    """Find out before anything slow that what a repair needs is not installed.

    Raises:
        MissingPackageError: saying what to install.
    """
    for step in work.recipe.repair.steps:
        settings = getattr(work.recipe.repair, step)
        if isinstance(settings, Training):
            settings.require()


def judge_repair(work: Work, repairing: Repairing) -> float:
    """The validation objective of the model as it stands, factors in float32 where they are."""
    with computing(work.loaded.model):
        return repairing.objective({})[0]


def repair_step(work: Work, repairing: Repairing | None, step: str) -> None:
    """Carry out one step, or take it from a finished stage.

    Args:
        work: the run; its sites hold factors.
        repairing: what `prepare_repair` returned; what this step did is added to it.
        step: `refit`, `blocks`, `subspace`, `factors` or `lora`.

    Raises:
        ModelError: when the architecture's blocks cannot be run alone.
        NotFiniteError: naming the site or the step.
        DataError: when the data to learn from cannot be read.
    """
    assert repairing is not None
    settings = getattr(work.recipe.repair, step)
    factored = any(kind_of(site.module(work.loaded.model)).trains for site in work.sites)
    # Of what lost units alone adapters train the weights.
    if not factored and not (work.stays and step == "lora"):
        work.reporter.note(f"repair {step} has nothing to do: every site is dense")
        return
    trains = isinstance(settings, Training)
    examples = _examples(work) if trains else None
    repairing.key["steps"].append([step, settings.model_dump(), examples.fingerprint if examples else None])
    stage = work.stage(f"repair-{step}", repairing.key)
    if stage.taken_over():
        done = RepairStep.model_validate_json((stage.folder / "facts.json").read_text())
        for file in [_FACTORS] if trains else [_file(row.block) for row in done.blocks]:
            _load(work, stage.folder / file)
        repairing.done.append(done)
        return
    started = time.monotonic()
    with stage.making() as folder:
        if trains:
            assert examples is not None
            facts = _train_whole(work, repairing, step, settings, examples, folder)
        else:
            facts = _by_block(work, repairing, step, settings, folder)
        done = RepairStep(step=step, **facts, seconds=round(time.monotonic() - started, 1))
        with folder.writing("facts.json") as path:
            path.write_text(done.model_dump_json())
        for scratch in ("hidden", "trainer"):
            shutil.rmtree(folder.path / scratch, ignore_errors=True)
    repairing.done.append(done)


def _file(block: int) -> str:
    return f"block-{block:04d}.safetensors"


def _save(folder: Folder, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    with folder.writing(name) as path:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, path)


def _load(work: Work, path: Path) -> None:
    model = work.loaded.model
    for name, values in load_file(path).items():
        model.get_parameter(name).data.copy_(values)


def _snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def _by_block(work: Work, repairing: Repairing, step: str, settings: Any, folder: Folder) -> dict[str, Any]:
    """Refit or refine block after block, in forward order; finished blocks of a killed run are taken from `folder`."""
    model, recipe = work.loaded.model, work.recipe
    runner = BlockRunner(model, work.texts.calibration.ids, settings.batch_size)
    with repairing.original.in_place(model):
        runner.check()
    scratch, most = folder.path / "hidden", int(settings.memory * 1e9 / 4)
    shape = runner.shape
    # What the original's next block reads, and what the compressed model's does.
    dense, output, ahead_output, compressed = (allocate(shape, scratch, f"hidden-{i}", most) for i in range(4))
    compressed.copy_(runner.embed(dense))
    count = len(runner.blocks)
    rows: list[dict[str, Any]] = []
    start = before = judge_repair(work, repairing)
    with work.reporter.counting(f"repair, {step}", total=count) as advance:
        for index in range(count):
            sites = [site for site in work.sites if site.block == index]
            file, says = _file(index), f"block-{index:04d}.json"
            norms = step == "blocks" and settings.norms
            parameters = block_parameters(model, index, work.sites, norms)
            with repairing.original.in_place(model, sites):
                runner.forward_all(index, dense, output)
            if folder.has(file) and folder.has(says):
                _load(work, folder.path / file)
                rows.append(folder.read_json(says))
            elif parameters:
                old = _snapshot(parameters)
                row: dict[str, Any] = {"block": index, "objective_before": before}
                if step == "refit":
                    parts = (repairing.original, dense, compressed, settings, scratch, repairing.metric_of)
                    refit_block(runner, index, sites, *parts)
                else:
                    ahead = _ahead(work, repairing, runner, index, output, ahead_output) if settings.lookahead else None
                    losses = train_block(
                        runner, index, parameters, compressed, output, settings, recipe.seed, ahead, lambda _loss: None
                    )
                    row |= {"loss_first": losses[0], "loss_last": losses[-1], "steps": len(losses)}
                after = judge_repair(work, repairing)
                # Not `after >= before`: an objective that is not a number is refused too.
                row |= {"objective_after": after, "accepted": after < before}
                if not row["accepted"]:
                    _restore(parameters, old)
                folder.write_json(says, row)
                _save(folder, file, parameters)
                rows.append(row)
            if rows and rows[-1]["block"] == index:
                before = rows[-1]["objective_after"] if rows[-1]["accepted"] else rows[-1]["objective_before"]
            runner.forward_all(index, compressed, compressed)
            dense, output = output, dense
            advance(f"repair, {step}: objective {before:.5g}, at the start {start:.5g}")
    if step == "refit" and any(site.pool for site in work.sites):
        work.reporter.note("repair refit: experts are left as they are; blocks and those after it train them")
    refused = [row["block"] for row in rows if not row["accepted"]]
    if refused:
        work.reporter.note(
            f"repair {step}: undone in block{'s' if len(refused) > 1 else ''} {', '.join(map(str, refused))}, where "
            "the validation objective rose"
        )
    return {"objective_before": start, "objective_after": before, "accepted": before < start, "blocks": rows}


def _ahead(
    work: Work, repairing: Repairing, runner: BlockRunner, index: int, output: Tensor, ahead_output: Tensor
) -> Any:
    """The original's next block with its output, for the look-ahead loss; None after the last."""
    if index + 1 == len(runner.blocks):
        return None
    sites = [site for site in work.sites if site.block == index + 1]
    place = repairing.original.in_place(work.loaded.model, sites)
    with place:
        runner.forward_all(index + 1, output, ahead_output)
    return (lambda: repairing.original.in_place(work.loaded.model, sites)), ahead_output


def _examples(work: Work) -> Examples:
    settings, calibration = work.recipe.repair, work.texts.calibration
    if settings.data is None:
        rows = list(calibration.ids)
        return Examples(rows, rows, calibration.source)
    context = work.loaded.context
    length = settings.length or sequence_length(work.recipe.calibration, context) or calibration.ids.shape[1]
    if context is not None and length > context:
        work.reporter.note(f"examples are cut to the context of {context} tokens, not {length}")
        length = context
    found = load_examples(
        parse_source(settings.data),
        work.loaded.tokenizer,
        work.loaded.vocabulary,
        length=length,
        output_only=settings.output_only,
        start=work.recipe.calibration.bos,
    )
    if found.shortened:
        work.reporter.note(f"{found.shortened} of {len(found)} examples were longer than {length} tokens and were cut")
    if settings.data == (work.recipe.validation.source or calibration.source):
        work.reporter.note(
            "the repair learns from the text it is judged by, so that it will be found better than it is: give "
            "--validation another text"
        )
    return found


def _train_whole(
    work: Work, repairing: Repairing, step: str, settings: Training, examples: Examples, folder: Folder
) -> dict[str, Any]:
    """Train all factors, or what is then merged into them or into weights, on the whole model."""
    model = work.loaded.model
    # What is left out stays as it is to the last bit; it has no factors, but it could have an adapter.
    sites = [site for site in work.sites if site.name not in work.left_out] if step == "lora" else work.sites
    changing = settings.changes(model, sites)
    start = judge_repair(work, repairing)
    old = _snapshot(changing)
    parameters = settings.attach(model, sites, work.recipe.seed)

    head = Head(model, examples.ids[0][None])

    def teacher(ids: Tensor, mask: Tensor) -> Logits:
        # The head is the original's already: what is exchanged lies in the decoder.
        with repairing.original.in_place(model):
            return head(ids, None if bool(mask.all()) else mask)

    steps = steps_of(settings, len(examples))
    with work.reporter.counting(f"repair, {step}", total=steps) as advance:
        history = train(
            model,
            parameters,
            examples,
            settings,
            teacher=teacher,
            folder=folder.path / "trainer",
            seed=work.recipe.seed,
            reporter=work.reporter,
            step_done=lambda done, total, loss: advance(f"repair, {step}: loss {loss:.4g}"),
        )
    merged = settings.fold_in(model, sites, {})
    # Merging may put other layers in place, whose parameters have the same names.
    changed = {name: model.get_parameter(name) for name in old}
    after = judge_repair(work, repairing)
    accepted = after < start
    if not accepted:
        _restore(changed, old)
        work.reporter.note(
            f"repair {step} was undone: the validation objective rose from {start:.5g} to {after:.5g}; a lower "
            f"repair.{step}.lr may help"
        )
    _save(folder, _FACTORS, changed)
    return {
        **merged,
        "objective_before": start,
        "objective_after": after,
        "accepted": accepted,
        "examples": {"source": examples.source, "count": len(examples), "tokens": examples.tokens},
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "history": history,
    }
