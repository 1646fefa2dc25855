"""The flow of fine-tuning: compressed checkpoint -> factors -> training -> folded in -> checkpoint of the same kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.progress import Reporter
    from rankwise.recipes import FineTune
    from rankwise.reports import Report


def finetune(
    wanted: FineTune, *, restart: bool = False, overwrite: bool = False, reporter: Reporter | None = None
) -> Report:
    """Fine-tune a compressed model and write it as a checkpoint of the same kind.

    A killed training goes on from its last checkpoint when the same call is made again.

    Args:
        wanted: the whole run.
        restart: throw away what an earlier training for this output left.
        overwrite: replace the result of another model too, where `wanted.output` holds one.
        reporter: told about stages, progress and notes.

    Returns:
        The report that is written with the checkpoint.

    Raises:
        RankwiseError: for anything the user can mend.
    """
    # Imported here so that `import rankwise` stays light.
    from rankwise.checkpoints import REPORT_FILE, check_output, made_from, reserved
    from rankwise.data import require_files
    from rankwise.progress import Reporter
    from rankwise.stages.begun import training_folder

    reporter = reporter or Reporter(show=False)
    require_files(wanted.data, wanted.evaluation)
    output, source = Path(wanted.output), Path(wanted.model)
    # A model may be trained in its own place: it is in memory whole before it is replaced.
    keep = {} if source.resolve() == output.resolve() else {"the model": source}
    check_output(output, keep, None if overwrite else made_from(source / REPORT_FILE))
    with reserved(output), training_folder(output, reporter) as folder:
        report = _finetune(wanted, folder, restart, reporter)
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _finetune(wanted: FineTune, folder: Path, restart: bool, reporter: Reporter) -> Report:
    """The flow itself, in a folder that no other process trains in."""
    from rankwise.checkpoints import load_model
    from rankwise.device import named_device
    from rankwise.evaluation import measure_cost
    from rankwise.stages import begun, tuned, tuning

    output = Path(wanted.output)
    report, plan = tuning.read_results(Path(wanted.model))
    with reporter.stage("load"):
        device = named_device(wanted.device)
        loaded = load_model(wanted.model, precision=wanted.precision, device=device)
        examples = tuning.read_examples(wanted, loaded, reporter)
        settings = tuning.settings_of(wanted, loaded, examples)
        begun.same_settings(folder, settings, restart, reporter)
        sites = tuning.sites_of(loaded, plan, wanted.method)
        plan = tuning.counted(plan, loaded)
        before = measure_cost(loaded.model, sites, loaded.stored_dtypes)
        as_stored = tuning.parts_of(loaded, sites)
        dtypes = tuning.open_factors(loaded, sites, wanted.training)
        teacher = tuning.teacher_of(wanted, report, loaded, device, reporter) if wanted.training.loss == "kl" else None
    with reporter.stage("evaluate before"):
        score_before = tuning.score_tuned(wanted, loaded, reporter)
        start = tuning.judge_tuned(wanted, loaded, examples.judged, teacher)
    with reporter.stage(f"train {wanted.method}"):
        begun.begin_training(folder, settings)
        facts = tuning.train_factors(wanted, loaded, sites, plan, examples.learned, teacher, folder, reporter)
        after = tuning.judge_tuned(wanted, loaded, examples.judged, teacher)
        facts |= {"loss_before": start, "loss_after": after, "accepted": after < start}
    with reporter.stage("storage"):
        probe = examples.learned.ids[0][None, :64]
        if facts["accepted"]:
            plan, stored = tuning.store_tuned(wanted, loaded, sites, plan, dtypes, probe, reporter)
        else:
            stored = tuning.put_back(wanted, loaded, as_stored, facts, reporter)
    cost = measure_cost(loaded.model, sites, loaded.stored_dtypes)
    with reporter.stage("evaluate after"):
        scores = score_before, tuning.score_tuned(wanted, loaded, reporter)
    with reporter.stage("checkpoint"):
        step = tuned.step_of(wanted, examples, scores, before, facts)
        report = tuned.write_tuned(report, output, loaded, sites, plan, stored, cost, step, probe, reporter)
    return report
