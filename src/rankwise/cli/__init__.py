"""The command line: parses, calls, prints. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rankwise import __version__
from rankwise.cli.boundary import run_guarded
from rankwise.cli.caching import cache_app
from rankwise.cli.common import (
    Bos,
    Device,
    Executor,
    Json,
    Overwrite,
    Quiet,
    Trust,
    Workers,
    print_json,
    reporter_for,
)
from rankwise.cli.comparing import compare, report
from rankwise.cli.evaluating import evaluate
from rankwise.cli.files import plan_app, recipes_app
from rankwise.cli.finetuning import finetune
from rankwise.cli.measuring import cost, speed
from rankwise.cli.options import defaults_in_words, put, read_fractions, recipe_of, require_trust
from rankwise.cli.planning_memory import plan_memory
from rankwise.cli.talking import chat, generate

app = typer.Typer(
    help="Make a Hugging Face causal language model smaller, and know what was lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(plan_app, name="plan")
app.add_typer(cache_app, name="cache")
app.command()(finetune)
app.command(name="plan-memory")(plan_memory)
app.command()(chat)
app.command()(evaluate)
app.command()(generate)
app.command()(cost)
app.command()(speed)
app.command()(compare)
app.command()(report)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    model: Annotated[str | None, typer.Argument(help="Directory or hub name of the checkpoint.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory to write.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the decoder's linear weights to keep, in (0, 1].")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Size of all weight files instead, such as 90MB.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="svd, fwsvd, asvd, svd_llm, afm, bolaco, two_sided; quantize, caldera or mixed for few bits."
        ),
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Bits a linear weight on the average, instead.")] = None,
    q_bits: Annotated[int | None, typer.Option(help="Bits of Q in W ~ Q + L R.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of L R at every site (caldera).")] = None,
    lr_bits: Annotated[int | None, typer.Option(help="Bits of L and R (caldera); 16 for unquantised.")] = None,
    codebook: Annotated[str | None, typer.Option(help="Of Q: e8p, uniform, nf, or FILE.py:Class.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Compress only linear weights whose names match, such as '*.mlp.*'; may be given more than once.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave linear weights whose names match as they are; --keep and --bits still count them.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="8bit stores embeddings in 8 bits; a head that is tied to them too.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="8bit stores the head in 8 bits; embeddings that are tied to it too. low-rank stores two factors; "
            "low-rank:0.6 says how much of it to keep."
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="spectral, bayesian:5x1, bayesian:5x4, bayesian:spectral, uniform, manual:q=0.7,k=0.7,v=dense,..., or "
            "FILE.py:Class."
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="A plan to take over; with --trials or a search, to start from.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of a search; may be raised later.")] = None,
    repair: Annotated[
        str | None, typer.Option(help="refit, blocks, subspace, factors, lora: any of them, joined by commas.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text that subspace, factors and lora learn from; alpaca:FILE.jsonl for instructions."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text source, e.g. text:FILE, jsonl:FILE#text, bundled.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Text source on which a search judges its plans.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Text source to score before and after.")] = None,
    speed: Annotated[
        bool | None, typer.Option("--speed/--no-speed", help="Time a short decode too, where a text is scored.")
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    gradient_sequences: Annotated[
        int | None, typer.Option(help="At how many of these gradients are taken; all by default, few on a CPU.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence, in every text.")] = None,
    bos: Bos = None,
    seed: Annotated[int | None, typer.Option(help="For everything drawn.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="auto (the smaller of the two, by site); two_factor; pivoted.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="low_rank, or dense (multiplied back; no size saved).")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or the name of a ready recipe; options override it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override any key: --set budget.rank_multiple=1")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    memory: Annotated[
        str | None, typer.Option(help="auto; whole, or blocks or disk for a model larger than memory.")
    ] = None,
    executor: Executor = None,
    workers: Workers = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where finished stages are kept and looked for.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress MODEL and write a checkpoint to --output."""
    given: dict[str, Any] = {
        "model": model,
        "output": output,
        "budget.keep": keep,
        "budget.bits": bits,
        "budget.size": size,
        "budget.storage": storage,
        "method": method,
        "include": include or None,
        "exclude": exclude or None,
        "embeddings": embeddings,
        "head": head,
        "allocation": allocation,
        "calibration.source": calibration,
        "validation.source": validation,
        "calibration.sequences": sequences,
        "calibration.gradient_sequences": gradient_sequences,
        "calibration.length": length,
        "validation.length": length,
        "calibration.bos": bos,
        "validation.bos": bos,
        "repair.steps": repair,
        "repair.data": data,
        "seed": seed,
        "evaluation.source": evaluation,
        "format": format,
        "device": device,
        "memory": memory,
        "executor": executor,
        "workers": workers,
        "trust_remote_code": trust_remote_code or None,
    }
    # These are of the text to score, where there is one.
    given |= {"evaluation.length?": length, "evaluation.bos?": bos, "evaluation.speed?": speed}
    few = {"q_bits": q_bits, "rank": rank, "lr_bits": lr_bits, "codebook": codebook}
    valid = recipe_of(given, recipe=recipe, plan=plan, trials=trials, few=few, assignments=set_ or [])

    from rankwise.flows.compress import compress as run

    reporter = reporter_for(quiet, lines=True)
    reporter.facts["model"] = valid.model
    sized = recipe is not None or plan is not None or (keep, bits, size) != (None, None, None)
    named = recipe is not None or plan is not None or method is not None
    for line in defaults_in_words(valid, sized=sized, named=named):
        reporter.say(line)
    result = run(valid, run_directory=run_dir, overwrite=overwrite, reporter=reporter)
    if json:
        print_json(result.report.model_dump(mode="json"))
    elif not quiet:
        from rankwise.reports import print_closing

        print_closing(result.report)
        print(f"written to {valid.output}")


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="svd, fwsvd, asvd, svd_llm, afm, bolaco or two_sided.")] = "bolaco",
    fractions: Annotated[str | None, typer.Option(help="Kept fractions for roles, e.g. 0.2,0.5,0.8.")] = None,
    site_fraction: Annotated[float, typer.Option(help="Kept fraction for single sites.")] = 0.5,
    calibration: Annotated[str, typer.Option(help="Text source.")] = "bundled",
    validation: Annotated[str | None, typer.Option(help="Text source the points are scored on.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    bos: Bos = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override any key of a recipe.")] = None,
    device: Device = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="Where finished stages are kept and looked for.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress one role, then one site, at a time, and draw what each bears."""
    from rankwise.recipes import recipe_from

    values: dict[str, Any] = {"model": model, "method": method, "device": device}
    given: dict[str, Any] = {
        "calibration.source": calibration,
        "validation.source": validation,
        "calibration.sequences": sequences,
        "calibration.length": length,
        "validation.length": length,
        "calibration.bos": bos,
        "validation.bos": bos,
        "trust_remote_code": trust_remote_code,
    }
    put(values, given, set_ or [])
    require_trust(values, trust_remote_code, "--set")
    recipe = recipe_from(values, origin="command line")

    from rankwise.flows.sensitivity import FRACTIONS
    from rankwise.flows.sensitivity import sensitivity as run

    reporter = reporter_for(quiet, lines=True)
    reporter.facts["model"] = recipe.model
    found = run(
        recipe,
        output,
        fractions=FRACTIONS if fractions is None else read_fractions(fractions),
        site_fraction=site_fraction,
        run_directory=run_dir,
        overwrite=overwrite,
        reporter=reporter,
    )
    if json:
        print_json(found)
        return
    print(f"perplexity of the original: {found['dense_perplexity']:.4f}")
    worst = sorted(
        (p for p in found["points"] if p["kind"] == "site"),
        key=lambda p: -(p["perplexity"] if p["perplexity"] is not None else float("inf")),
    )
    for point in worst[:5]:
        shown = "not finite" if point["perplexity"] is None else f"{point['perplexity']:.4f}"
        print(f"block {point['block']} {point['role']} alone at {point['keep']:g}: {shown}")
    print(f"written to {output}")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")] = Path("quickstart-output"),
    keep: Annotated[float, typer.Option(help="Fraction of the decoder's linear weights to keep.")] = 0.8,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compress the bundled model and show what was saved and lost. Needs no network."""
    from rankwise.quickstart import run

    run(output, keep, reporter_for(quiet, lines=True), overwrite=overwrite)


def _quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> NoReturn:
    """Run the command line: whatever happens ends with text for a person and a status, never with a traceback."""
    _quiet_libraries()
    sys.exit(run_guarded(app))
