"""The end of a run: scores, and the checkpoint with its report."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from rankwise.checkpoints import (
    REPORT_FILE,
    check_reload,
    front_matter,
    is_plain,
    save_dense,
    save_low_rank,
    writing,
)
from rankwise.device import describe
from rankwise.errors import RankwiseError
from rankwise.evaluation import Cost, Perplexity, decode_speed, measure_cost, perplexity
from rankwise.layers import decoded_once
from rankwise.models import reads_images
from rankwise.reports import (
    SPECTRA_FILE,
    CalibrationText,
    Kept,
    Machine,
    MemoryUse,
    RecipeSettings,
    Report,
    Scores,
    SiteReport,
    Speed,
    bits_of,
    can_draw,
    draw_iterations,
    draw_losses,
    draw_plan,
    draw_trials,
    model_card,
    verdict,
    write_report_page,
)
from rankwise.sizes import Plan
from rankwise.stages.fitting import SiteFacts
from rankwise.stages.keys import calibration_key, model_key
from rankwise.stages.measuring import requests_of
from rankwise.stages.planning import Chosen
from rankwise.stages.repairing import Repairing
from rankwise.stages.work import Work
from rankwise.version import __version__


def score(work: Work, what: str, plan: Plan | None = None, repairing: Repairing | None = None) -> Perplexity | None:
    """Perplexity of the model as it stands, kept as a stage; None when the recipe asks for none."""
    settings, texts = work.recipe.evaluation, work.texts.evaluation
    if settings is None or texts is None:
        return None
    key: dict[str, Any] = {
        **model_key(work),
        "ids": texts.fingerprint,
        "stride": settings.stride,
        "batch": settings.batch_size,
    }
    if plan is not None:
        key |= {
            "plan": plan.model_dump(mode="json", include={"cuts", "form"}),
            "method": work.recipe.method.model_dump(),
            **calibration_key(work),
        }
    if plan is not None and work.vocabulary is not None:
        key["vocabulary"] = asdict(work.vocabulary)
    if repairing is not None:
        key["repaired"] = repairing.key
    stage = work.stage(f"score-{what}", key)
    if not stage.taken_over():
        found = perplexity(
            work.loaded.model,
            texts.ids,
            stride=settings.stride,
            batch_size=settings.batch_size,
            reporter=work.reporter,
            description=f"perplexity, {what}",
            bos=texts.bos,
        )
        with stage.making() as folder:
            folder.write_json("perplexity.json", asdict(found))
    return Perplexity(**json.loads((stage.folder / "perplexity.json").read_text()))


def speed(work: Work) -> tuple[float, bool] | None:
    """Tokens a second of the model as it stands, and whether weights were kept decoded; None where none are asked for.

    It is of this machine and this moment, and no stage keeps it.
    """
    settings = work.recipe.evaluation
    if settings is None or not settings.speed:
        return None
    with decoded_once(work.loaded.model) as kept:
        return decode_speed(work.loaded.model, work.texts.calibration.ids[0]), kept


def machine_of(device: torch.device) -> Machine:
    """Where a run takes place."""
    return Machine(
        device=describe(device),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        rankwise=__version__,
    )


def _gradient_sequences(work: Work) -> int | None:
    """At how many calibration sequences gradients were taken; None for all, and for none."""
    taken = any(statistic.labels is not None for statistic in requests_of(work))
    few = work.gradient_sequences < len(work.texts.calibration.ids)
    return work.gradient_sequences if taken and few else None


def _memory(work: Work) -> MemoryUse:
    stages = work.reporter.stages.values()
    used = [stage.anonymous_bytes for stage in stages if stage.anonymous_bytes is not None]
    known = {}
    if work.loaded.model.device.type == "cuda":
        known["gpu_used_bytes"] = max((stage.gpu_bytes or 0 for stage in stages), default=0)
        if work.need is not None:
            known["gpu_expected_bytes"] = work.need.device
    expected = None if work.need is None else work.need.host
    return MemoryUse(mode=work.memory, expected_bytes=expected, used_bytes=max(used, default=None), **known)


def _report(
    work: Work,
    chosen: Chosen,
    facts: SiteFacts,
    repairing: Repairing | None,
    costs: tuple[Cost, Cost],
    scores: tuple[Perplexity | None, Perplexity | None],
    speeds: tuple[tuple[float, bool] | None, tuple[float, bool] | None],
) -> Report:
    """What is known when the checkpoint is about to be written."""
    recipe, plan, calibration = work.recipe, chosen.plan, work.texts.calibration
    (before, after), (dense, compressed) = costs, scores
    evaluation = None
    if recipe.evaluation is not None and dense is not None and compressed is not None:
        evaluation = Scores(source=recipe.evaluation.source, dense=dense, compressed=compressed)
    timed = None
    if speeds[0] is not None and speeds[1] is not None:
        timed = Speed(before=speeds[0][0], after=speeds[1][0], decoded_once=speeds[1][1])
    return Report(
        recipe=RecipeSettings(**recipe.model_dump(mode="json")),
        model_fingerprint=work.fingerprint,
        architecture=plan.architecture,
        keep=Kept(asked=plan.keep, got=plan.kept),
        bits=bits_of(plan, before),
        storage=plan.form.storage,
        size=plan.size,
        coded=plan.coded,
        before=before,
        after=after,
        biases_added=after.linear_biases - before.linear_biases,
        evaluation=evaluation,
        speed=timed,
        calibration=CalibrationText(
            source=calibration.source,
            sequences=calibration.ids.shape[0],
            length=calibration.ids.shape[1],
            available=calibration.available,
            fingerprint=calibration.fingerprint,
            bos=calibration.bos,
            gradient_sequences=_gradient_sequences(work),
        ),
        search=chosen.search,
        repair=() if repairing is None else tuple(repairing.done),
        groups=plan.groups,
        sites={site.name: SiteReport.of(site, plan.cuts[site.name], **facts.get(site.name, {})) for site in work.sites},
        stages=dict(work.reporter.stages),
        memory=_memory(work),
        machine=machine_of(work.loaded.model.device),
        notes=tuple(work.reporter.notes),
        run_directory=str(work.run.directory),
    )


def write(
    work: Work,
    chosen: Chosen,
    facts: SiteFacts,
    repairing: Repairing | None,
    costs: tuple[Cost, Cost],
    scores: tuple[Perplexity | None, Perplexity | None],
    speeds: tuple[tuple[float, bool] | None, tuple[float, bool] | None],
) -> Report:
    """Save the checkpoint with its report and model card, tried in a fresh process; whole or not at all.

    Returns:
        The report.

    Raises:
        OutputError: when the disk is full or the place not writable.
        ModelError: when the architecture cannot be written in the format asked for, or is another model when loaded.
    """
    recipe, loaded = work.recipe, work.loaded
    loaded.to_stored_dtypes()
    report = _report(work, chosen, facts, repairing, costs, scores, speeds)
    report = report.model_copy(update={"verdict": verdict(report)})
    if recipe.output is None:
        return report
    # What the architecture itself says needs no code of ours.
    plain = recipe.format == "dense" or (bool(work.originals) and is_plain(loaded.model, work.sites))
    save = save_dense if plain else save_low_rank
    try:
        with writing(Path(recipe.output)) as folder:
            save(folder, loaded, work.sites, recipe.max_shard_size)
            own_code = not plain or recipe.trust_remote_code
            seen = check_reload(folder, loaded.model, work.texts.calibration.ids, own_code)
            if reads_images(loaded.model) and not seen:
                work.reporter.note("the checkpoint was tried on text alone: no image could be made from the config")
                report = report.model_copy(update={"notes": tuple(work.reporter.notes)})
            # Multiplied back, the model in memory is what was written, and no longer what was planned. Where experts
            # and groups are one again, as in the original, sites are gone and its size is that of the original.
            there = dict(loaded.model.named_modules())
            fused = not all(site.name in there for site in work.sites)
            after = costs[0] if fused else measure_cost(loaded.model, work.sites, loaded.stored_dtypes)
            report = report.model_copy(update={"after": after, "bytes_on_disk": bytes_of_weights(folder)})
            report.save(folder / REPORT_FILE)
            (folder / "plan.json").write_text(chosen.plan.model_dump_json(indent=2) + "\n")
            if chosen.spectra:
                (folder / SPECTRA_FILE).write_text(json.dumps(chosen.spectra, indent=1) + "\n")
            if chosen.trials:
                (folder / "trials.jsonl").write_text("".join(json.dumps(t) + "\n" for t in chosen.trials))
            if can_draw():
                _draw(folder, chosen, report)
            write_report_page(folder, report, chosen.plan)
            sees = reads_images(loaded.model)
            card = model_card(
                report, plain, sees, front_matter(loaded.source), directory=Path(recipe.output).absolute().name
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
    except RankwiseError:
        work.reporter.note(f"finished stages are kept in {work.run.directory}")
        raise
    return report


def _draw(folder: Path, chosen: Chosen, report: Report) -> None:
    """Draw the plan, and the search, the trainings and the iterations that there were."""
    draw_plan(folder / "plan.svg", chosen.plan)
    if chosen.trials:
        draw_trials(folder / "trials.svg", chosen.trials)
    curves = {step.step: step.history for step in report.repair if step.history}
    if curves:
        draw_losses(folder / "repair.svg", curves)
    errors = {name: site.errors for name, site in report.sites.items() if len(site.errors) > 1}
    if errors:
        draw_iterations(folder / "iterations.svg", errors, {name: site.role for name, site in report.sites.items()})


def bytes_of_weights(folder: Path) -> int:
    """Size of all weight files in a directory."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
