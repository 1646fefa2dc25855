"""The end of a run: scores, and the checkpoint with its report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from rankwise.checkpoints import REPORT_FILE, save_dense, save_low_rank, writing
from rankwise.device import describe
from rankwise.errors import RankwiseError
from rankwise.evaluation import Cost, Perplexity, perplexity
from rankwise.reports import build_report, can_draw, draw_iterations, draw_losses, draw_plan, draw_trials, model_card
from rankwise.sizes import Plan
from rankwise.stages.planning import Chosen
from rankwise.stages.repairing import Repairing
from rankwise.stages.work import Work, calibration_key, model_key
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
    if repairing is not None:
        key["repaired"] = repairing.key
    stage = work.run.stage(f"score-{what}", key)
    if not stage.done:
        found = perplexity(
            work.loaded.model,
            texts.ids,
            stride=settings.stride,
            batch_size=settings.batch_size,
            reporter=work.reporter,
            description=f"perplexity, {what}",
        )
        with stage.making() as folder:
            (folder / "perplexity.json").write_text(json.dumps(asdict(found)))
    return Perplexity(**json.loads((stage.folder / "perplexity.json").read_text()))


def _machine(device: torch.device) -> dict[str, str]:
    return {
        "device": describe(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rankwise": __version__,
    }


def write(
    work: Work,
    chosen: Chosen,
    losses: Mapping[str, Mapping[str, Any]],
    repairing: Repairing | None,
    costs: tuple[Cost, Cost],
    scores: tuple[Perplexity | None, Perplexity | None],
) -> dict[str, Any]:
    """Save the checkpoint with its report and model card; whole or not at all.

    Returns:
        The report.

    Raises:
        OutputError: when the output is not ours to replace, or the disk is full.
        ModelError: when the architecture cannot be written in the format asked for.
    """
    recipe, loaded = work.recipe, work.loaded
    loaded.to_stored_dtypes()
    calibration = work.texts.calibration
    report = build_report(
        recipe=recipe.model_dump(mode="json"),
        fingerprint=work.fingerprint,
        plan=chosen.plan,
        search=chosen.search,
        repair=[] if repairing is None else repairing.facts,
        roles={site.name: (site.block, site.role) for site in work.sites},
        losses=losses,
        costs=costs,
        scores=scores,
        calibration={
            "source": calibration.source,
            "sequences": calibration.ids.shape[0],
            "length": calibration.ids.shape[1],
            "available": calibration.available,
            "fingerprint": calibration.fingerprint,
        },
        machine=_machine(loaded.model.device),
        notes=work.reporter.notes,
        stages=work.reporter.stages,
        run_directory=str(work.run.directory),
    )
    if recipe.output is None:
        return report
    save = save_low_rank if recipe.format == "low_rank" else save_dense
    try:
        with writing(Path(recipe.output)) as folder:
            save(folder, loaded, work.sites, recipe.max_shard_size)
            report["bytes_on_disk"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
            (folder / "plan.json").write_text(chosen.plan.model_dump_json(indent=2) + "\n")
            if chosen.trials:
                (folder / "trials.jsonl").write_text("".join(json.dumps(t) + "\n" for t in chosen.trials))
                if can_draw():
                    draw_trials(folder / "trials.svg", chosen.trials)
            curves = {step["step"]: step["history"] for step in report["repair"] if "history" in step}
            if curves and can_draw():
                draw_losses(folder / "repair.svg", curves)
            if can_draw():
                draw_plan(folder / "plan.svg", chosen.plan)
            errors = {name: facts["errors"] for name, facts in losses.items() if len(facts.get("errors", ())) > 1}
            if errors and can_draw():
                draw_iterations(folder / "iterations.svg", errors, {s.name: s.role for s in work.sites})
            (folder / "README.md").write_text(model_card(report))
    except RankwiseError:
        work.reporter.note(f"finished stages are kept in {work.run.directory}")
        raise
    return report
