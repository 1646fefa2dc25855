"""The flow: checkpoint -> sites -> statistics -> outlooks -> plan -> fits in place -> checkpoint.

Read `compress` from top to bottom: each line is a stage, explained in `stages/`, and none reaches back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.progress import Reporter
    from rankwise.recipes import Recipe
    from rankwise.reports import Report
    from rankwise.sizes import Plan


@dataclass(frozen=True)
class Compressed:
    """What a compression gives.

    Attributes:
        model: the compressed model, on its device, in the dtypes that were saved.
        tokenizer: its tokenizer, or None.
        plan: the cut of every site.
        report: what was done and measured; `rankwise_report.json` holds it.
    """

    model: Any
    tokenizer: Any
    plan: Plan
    report: Report


def compress(
    recipe: Recipe,
    *,
    run_directory: Path | str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Compressed:
    """Compress a causal language model.

    Stages that an earlier or a killed run finished are taken from `run_directory`.

    Args:
        recipe: the whole run.
        run_directory: where finished stages are kept; by default a folder for this model in the user's cache.
        overwrite: replace the result of another model too, where `recipe.output` holds one.
        reporter: told about stages, progress and notes; silent by default.

    Returns:
        The model, its plan and the report. When `recipe.output` is set, the checkpoint is there too.

    Raises:
        RankwiseError: for anything the user can mend; nothing finished is lost.
    """
    # Imported here so that `import rankwise` stays light.
    from rankwise import stages
    from rankwise.checkpoints import check_output, expect_reload, load_model, reserved
    from rankwise.device import named_device
    from rankwise.evaluation import measure_cost
    from rankwise.progress import Reporter
    from rankwise.runs import Run, default_run_directory

    recipe.require_files()
    reporter = reporter or Reporter(show=False)
    directory = Path(run_directory) if run_directory is not None else default_run_directory(recipe.model)
    output = None if recipe.output is None else Path(recipe.output)
    if output is not None:
        inputs = {"the model": Path(recipe.model), "the finished stages": directory}
        check_output(output, inputs, None if overwrite else recipe.model)
    run = Run(directory, reporter)
    with run.locked(), reserved(output):
        with reporter.stage("load"):
            need = stages.expected_need(recipe, reporter)
            memory = stages.chosen_memory(recipe, need)
            loaded = load_model(
                recipe.model,
                precision=recipe.precision,
                device=named_device(recipe.device),
                trust_remote_code=recipe.trust_remote_code,
                files=run.directory if memory in ("blocks", "disk") else None,
            )
            texts = stages.read_texts(recipe, loaded, reporter, validate=recipe.judges)
            work = stages.hire(stages.begin(recipe, run, loaded, texts, reporter, memory, need))
        dense_cost = measure_cost(loaded.model, work.sites, loaded.stored_dtypes)
        stages.check_budget(work)
        stages.check_repair(work)
        with reporter.stage("evaluate dense"):
            dense_score, dense_speed = stages.score(work, "dense"), stages.speed(work)
        if recipe.method.prunes:
            with reporter.stage("pruning"):
                work = stages.make_smaller(work)
        with reporter.stage("statistics"):
            store, head = stages.collect_statistics(work), stages.measure_head(work)
        outlooks = stages.Outlooks(work, store)
        if work.looks:
            with reporter.stage("outlooks"):
                outlooks.look()
        with reporter.stage("plan"):
            chosen = stages.choose_cuts(work, outlooks)
            repairing = stages.prepare_repair(work, store, outlooks, chosen.plan)
        with reporter.stage("fits"):
            facts = stages.fit_sites(work, outlooks, chosen.plan)
        for step in recipe.repair.steps:
            with reporter.stage(f"repair {step}"):
                stages.repair_step(work, repairing, step)
        timed = recipe.evaluation is not None and recipe.evaluation.speed
        if output is not None and not timed:
            # It imports meanwhile, which would slow down what is timed.
            expect_reload()
        with reporter.stage("storage"):
            facts = stages.store_sites(work, chosen.plan, facts)
            stages.store_vocabulary(loaded, work.vocabulary)
            stages.store_head(work, head)
        cost = measure_cost(loaded.model, work.sites, loaded.stored_dtypes)
        with reporter.stage("evaluate compressed"):
            score = stages.score(work, "compressed", chosen.plan, repairing)
            speeds = dense_speed, stages.speed(work)
        with reporter.stage("checkpoint"):
            report = stages.write(work, chosen, facts, repairing, (dense_cost, cost), (dense_score, score), speeds)
    report = report.model_copy(update={"stages": dict(reporter.stages)})
    return Compressed(loaded.model, loaded.tokenizer, chosen.plan, report)
