"""The end of `finetune`: what the training did, and the checkpoint with its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoints import (
    REPORT_FILE,
    LoadedModel,
    check_reload,
    front_matter,
    is_plain,
    save_dense,
    save_low_rank,
    writing,
)
from rankwise.evaluation import Cost, Perplexity
from rankwise.models import Site, reads_images
from rankwise.progress import Reporter
from rankwise.recipes import FineTune
from rankwise.repair import steps_of
from rankwise.reports import (
    ExampleCounts,
    FineTuneSettings,
    FineTuneStep,
    Report,
    can_draw,
    draw_losses,
    model_card,
    write_report_page,
)
from rankwise.sizes import Plan
from rankwise.stages.finish import bytes_of_weights
from rankwise.stages.fitting import SiteFacts
from rankwise.stages.tuning import TuningExamples


def step_of(
    wanted: FineTune,
    examples: TuningExamples,
    scores: tuple[Perplexity | None, Perplexity | None],
    before: Cost,
    facts: Mapping[str, Any],
) -> FineTuneStep:
    """What the report says of the training.

    Args:
        wanted: the whole run.
        examples: what was learned from.
        scores: perplexity before and after.
        before: size before.
        facts: what the training said of itself, and how it was judged.
    """
    training, count = wanted.training, len(examples.learned)
    passes = steps_of(training, count) / steps_of(training.model_copy(update={"epochs": 1.0}), count)
    settings = {**wanted.model_dump(mode="json"), "settings": training.model_dump(mode="json")}
    return FineTuneStep(
        settings=FineTuneSettings(**settings),
        examples=ExampleCounts(
            count=count,
            held_out=len(examples.judged),
            tokens=examples.learned.tokens,
            trained_tokens=round(passes * examples.learned.tokens),
        ),
        before=scores[0],
        after=scores[1],
        cost_before=before,
        **facts,
    )


def write_tuned(
    report: Report,
    output: Path,
    loaded: LoadedModel,
    sites: list[Site],
    plan: Plan,
    stored: SiteFacts,
    cost: Cost,
    step: FineTuneStep,
    probe: torch.Tensor,
    reporter: Reporter,
) -> Report:
    """Write the checkpoint, tried in a fresh process on a probe of tokens, shape `[1, tokens]`.

    The report is the compression's, brought up to date, with what training did.
    """
    loaded.to_stored_dtypes()
    bits = report.bits
    new = {
        "keep": report.keep.model_copy(update={"got": plan.kept}),
        "bits": None if bits is None else bits.model_copy(update={"got": plan.bits_a_weight}),
        "after": cost,
        "evaluation": None,
        "speed": None,
        "verdict": None,
        "sites": {name: site.with_cut(plan.cuts[name], **stored.get(name, {})) for name, site in report.sites.items()},
        "notes": (*report.notes, *reporter.notes),
        "finetune": (*report.finetune, step),
        "stages": dict(reporter.stages),
    }
    with writing(output) as folder:
        plain = bool(plan.originals) and is_plain(loaded.model, sites)
        save = save_dense if plain else save_low_rank
        save(folder, loaded, sites, report.recipe.max_shard_size)
        check_reload(folder, loaded.model, probe, trust_remote_code=True)
        report = report.model_copy(update={**new, "bytes_on_disk": bytes_of_weights(folder)})
        report.save(folder / REPORT_FILE)
        (folder / "plan.json").write_text(plan.model_dump_json(indent=2) + "\n")
        if can_draw():
            draw_losses(folder / "finetune.svg", {step.settings.method: step.history})
        write_report_page(folder, report, plan)
        sees = reads_images(loaded.model)
        card = model_card(report, plain, sees, front_matter(loaded.source), output.absolute().name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report
