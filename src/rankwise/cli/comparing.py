"""The commands that compare ways to make a model smaller, and that show what came out as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.common import (
    Bos,
    Cache,
    Executor,
    Json,
    Overwrite,
    Quiet,
    Trust,
    Workers,
    decode_once,
    load_named,
    named_executor,
    print_json,
    reporter_for,
)
from rankwise.cli.evaluating import task_names
from rankwise.cli.options import put, require_trust, separated
from rankwise.cli.talking import read_prompts

if TYPE_CHECKING:
    from rankwise.recipes import Comparison


def compare(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the checkpoint.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory to write.")],
    keep: Annotated[str | None, typer.Option(help="Fractions of the linear weights, e.g. 0.9,0.8,0.7.")] = None,
    bits: Annotated[str | None, typer.Option(help="Bits a linear weight instead, e.g. 2,2.5,3.")] = None,
    size: Annotated[str | None, typer.Option(help="Sizes of all weight files instead, e.g. 90MB,70MB.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or methods joined by commas, each with /ALLOCATION and +REPAIR if wanted: "
            "svd,bolaco/bayesian:5x1,two_sided+blocks."
        ),
    ] = "all",
    repair: Annotated[
        str | None, typer.Option(help="Repairs that every way of low rank is tried with as well, joined by commas.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... that every way is tried with.")] = 1,
    calibration: Annotated[str | None, typer.Option(help="Text source; bundled by default.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text source on which searches judge their plans.")] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Texts to score on, joined by commas: wikitext2, ptb, c4 or sources; bundled:heldout."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks, as for evaluate.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task at most.")] = None,
    task_text: Annotated[str | None, typer.Option(help="Text that the local tasks are made from.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File with a prompt a line, continued by every model.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    scored: Annotated[int | None, typer.Option(help="Sequences of each text that are scored; all by default.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence, in every text.")] = None,
    bos: Bos = None,
    storage: Annotated[str | None, typer.Option(help="As for compress.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override any key of the recipes.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    executor: Executor = None,
    workers: Workers = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where finished stages are kept and looked for.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make MODEL smaller in several ways at equal sizes, score all of them alike, and write tables and a page."""
    settings: dict[str, Any] = {}
    given: dict[str, Any] = {
        "calibration.source": calibration,
        "validation.source": validation,
        "calibration.sequences": sequences,
        "calibration.length": length,
        "validation.length": length,
        "calibration.bos": bos,
        "validation.bos": bos,
        "budget.storage": storage,
        "device": device,
        "trust_remote_code": trust_remote_code or None,
    }
    put(settings, given, set_ or [])
    require_trust(settings, trust_remote_code, "--set")
    windows = {"length": length, "sequences": scored, "bos": bos}
    comparison = _comparison(
        {
            "model": model,
            "output": output,
            "seeds": tuple(range(seeds)),
            "texts": [
                {"source": source, **{key: value for key, value in windows.items() if value is not None}}
                for source in separated(evaluation) or ([] if tasks else ["bundled:heldout"])
            ],
            "tasks": task_names(tasks),
            "limit": limit,
            "task_text": task_text,
            "prompts": [] if prompts is None else read_prompts(prompts),
            "settings": settings,
        },
        {"keep": keep, "bits": bits, "size": size},
        methods,
        separated(repair),
    )

    from rankwise.flows.compare import compare as run

    reporter = reporter_for(quiet, lines=True)
    reporter.facts["model"] = model
    found = run(
        comparison,
        run_directory=run_dir,
        overwrite=overwrite,
        executor=named_executor(executor, workers),
        workers=workers,
        reporter=reporter,
    )
    if json:
        print_json(found.model_dump(mode="json"))
    elif not quiet:
        from rankwise.reports import print_comparison

        print_comparison(found)
        print(f"written to {output}: comparison.html, .md, .csv, .json")
    if all(row.problem for row in found.rows[1:]):
        # Each row has said why.
        raise typer.Exit(2)


def _comparison(values: dict[str, Any], sizes: dict[str, str | None], methods: str, repair: list[str]) -> Comparison:
    from rankwise.errors import RecipeError, nearest
    from rankwise.recipes import STEPS, comparison_from, read_sizes, read_ways

    spelled = [(spelling, text) for spelling, text in sizes.items() if text is not None]
    if len(spelled) != 1:
        raise RecipeError(
            "Sizes are spelled in one way: as fractions kept, as bits, or as bytes.",
            where="compare",
            remedy="give one of --keep 0.9,0.8, --bits 2,3 and --size 90MB",
        )
    for step in repair:
        if step not in STEPS:
            raise RecipeError(f"There is no repair {step!r}.", where="--repair", remedy=nearest(step, STEPS))
    ((spelling, text),) = spelled
    ways = read_ways(methods, spelling, repair)  # type: ignore[arg-type]
    found = read_sizes(text, spelling)  # type: ignore[arg-type]
    return comparison_from({**values, "spelling": spelling, "sizes": found, "ways": ways})


def report(
    directory: Annotated[Path, typer.Argument(help="Directory that compress, finetune or compare wrote.")],
    against: Annotated[
        str | None, typer.Option(help="The original, for texts of both side by side; with --prompts.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="File with a prompt a line.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Most tokens to add to a prompt.")] = 48,
    dense_cache: Cache = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write what is known of a result as one HTML file that needs nothing else."""
    from rankwise.checkpoints import REPORT_FILE, listed
    from rankwise.errors import ModelError, RecipeError
    from rankwise.evaluation import generate
    from rankwise.reports import COMPARISON_FILE, ComparedModels, Report, write_comparison_page, write_report_page
    from rankwise.sizes import Plan

    if (against is None) != (prompts is None):
        raise RecipeError(
            "Texts side by side need a second model and prompts.", where="report", remedy="give --against and --prompts"
        )
    if (directory / COMPARISON_FILE).is_file():
        print(f"written: {write_comparison_page(directory, ComparedModels.load(directory / COMPARISON_FILE))}")
        return
    if not (directory / REPORT_FILE).is_file():
        raise ModelError(
            "The directory holds no report of a compression or a comparison.",
            where=str(directory),
            remedy=f"give one that holds {REPORT_FILE} or {COMPARISON_FILE}",
        )
    known = Report.load(directory / REPORT_FILE)
    plan = Plan.load(directory / "plan.json")
    rows: list[dict[str, Any]] = []
    if against is not None and prompts is not None:
        rows = [{"prompt": prompt} for prompt in read_prompts(prompts)]
        for label, source in (("before", against), ("after", str(directory))):
            loaded = load_named(source, "auto", "auto", trust_remote_code)
            decode_once(loaded.model, dense_cache)
            for row in rows:
                row[label] = generate(loaded.model, loaded.tokenizer, row["prompt"], new_tokens=new_tokens)
    print(f"written: {listed(write_report_page(directory, known, plan, rows))}")
