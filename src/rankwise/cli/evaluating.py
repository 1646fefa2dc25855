"""The command that scores a model: perplexity on texts, accuracy on tasks, alone or beside another model."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.common import (
    Bos,
    Cache,
    Device,
    Json,
    Precision,
    Quiet,
    Trust,
    decode_once,
    load_named,
    print_json,
    reporter_for,
)
from rankwise.cli.options import scored_as, separated

if TYPE_CHECKING:
    from rankwise.checkpoints import LoadedModel
    from rankwise.evaluation import Scored
    from rankwise.progress import Reporter
    from rankwise.recipes import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub name, dense or compressed.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text source, e.g. text:FILE, tokens:FILE, bundled:heldout. "
            "By default the one that a compressed model's report names, and its windows."
        ),
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(help="Several texts, joined by commas: wikitext2, ptb, c4, or sources as for --text.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, joined by commas; without a network local_next_sentence, "
            "local_cloze, local_order, local_arithmetic, or all of them: local."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second model, such as the original: differences too.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples that a prompt shows; as the task says.")] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with task files of your own; they may run code.")
    ] = None,
    task_text: Annotated[
        str | None, typer.Option(help="Text that the local tasks are made from; bundled:heldout by default.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window; 512 or the context if shorter.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; the length by default.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences to score; all by default.")] = None,
    skip: Annotated[int | None, typer.Option(help="Sequences skipped at the start; none by default.")] = None,
    sample: Annotated[str | None, typer.Option(help="first (the default), or random (drawn by --seed).")] = None,
    seed: Annotated[int | None, typer.Option(help="For --sample random; 0 by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or requests of a task, a batch.")] = 8,
    bos: Bos = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for everything, the harness's own results too.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    dense_cache: Cache = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a model: perplexity (exp of the mean loss over every scored token) and accuracy on tasks."""
    from rankwise.data import parse_source, require_files
    from rankwise.errors import OutputError, RecipeError
    from rankwise.evaluation import require_same_tokenizer, require_tasks
    from rankwise.recipes import recipe_from

    reporter = reporter_for(quiet)
    reporter.facts["model"] = model
    windows = {
        "length": length,
        "stride": stride,
        "sequences": sequences,
        "skip": skip,
        "sample": sample,
        "seed": seed,
        "bos": bos,
    }
    wanted = task_names(tasks)
    sources = separated(perplexity)
    if text is not None and sources:
        raise RecipeError(
            "A text is given twice.", where="--text and --perplexity", remedy="give all of them to --perplexity"
        )
    if not wanted and (limit, shots, include_path, task_text) != (None, None, None, None):
        raise RecipeError("Options on tasks are given, and no task.", where="evaluate", remedy="add --tasks local")
    known = not sources and not (wanted and text is None)
    if known:
        asked, from_report = scored_as(model, text, windows)
        texts = [asked]
        if from_report:
            reporter.note(f"text and windows are those of the report: {asked['source']}")
    else:
        given = {key: value for key, value in windows.items() if value is not None}
        texts = [{"source": source, **given} for source in ([text] if text else sources)]
    if not texts and any(value is not None for value in windows.values()):
        raise RecipeError("Options on windows are given, and no text.", where="evaluate", remedy="add --perplexity")
    if output is not None and not output.absolute().parent.is_dir():
        raise OutputError(
            "There is no such folder.", where=str(output.parent), remedy="make it, or give another --output"
        )
    # What is wrong with a second text is said before the first is scored.
    settings = [
        recipe_from(
            {"model": model, "evaluation": {**each, "batch_size": batch_size}}, origin="command line"
        ).evaluation
        for each in texts
    ]
    require_files(task_text, *(each.source for each in settings if each))
    options: dict[str, Any] = {"limit": limit, "shots": shots, "include": include_path or [], "batch_size": batch_size}
    if task_text is not None:
        options["text"] = parse_source(task_text)
    if wanted:
        require_tasks(wanted, include_path or [])
    found: list[Scored] = []
    tokenizers: dict[str, Any] = {}
    for name in filter(None, (model, against)):
        with reporter.stage(f"load {name}"):
            loaded = load_named(name, device, precision, trust_remote_code)
            reporter.facts["architecture"] = type(loaded.model).__name__
            for other, tokenizer in tokenizers.items():
                require_same_tokenizer(tokenizer, loaded.tokenizer, (other, name))
            tokenizers[name] = loaded.tokenizer
            decode_once(loaded.model, dense_cache, quiet)
        with reporter.stage("evaluate"):
            found.append(_score(loaded, [each for each in settings if each], wanted, options, reporter))
    if output is not None:
        _write(output, found)
    if len(found) == 1 and not wanted and len(texts) == 1:
        _print_one(found[0], json)
    else:
        _print_table(found, json)


def task_names(text: str | None) -> list[str]:
    """Names joined by commas; `local` stands for the tasks that need no network."""
    from rankwise.evaluation.local_tasks import LOCAL_TASKS

    return [each for name in separated(text) for each in (LOCAL_TASKS if name == "local" else (name,))]


def _score(
    loaded: LoadedModel, settings: list[Evaluation], tasks: list[str], options: dict[str, Any], reporter: Reporter
) -> Scored:
    """A model's perplexity on every text and its accuracy on every task."""
    from rankwise.evaluation import Scored, perplexity, run_tasks
    from rankwise.stages import read_sequences

    read = {each.source: read_sequences(each, loaded, each.seed, each.skip) for each in settings}
    found = {
        each.source: perplexity(
            loaded.model,
            read[each.source].ids,
            stride=each.stride,
            batch_size=each.batch_size,
            reporter=reporter,
            description=f"perplexity, {each.source}",
            bos=read[each.source].bos,
        )
        for each in settings
    }
    results = run_tasks(loaded.model, loaded.tokenizer, tasks, reporter=reporter, **options) if tasks else None
    available = {source: sequences.available for source, sequences in read.items()}
    return Scored(loaded.source, found, results, available)


def _write(path: Path, found: list[Scored]) -> None:
    from rankwise.runs import write_atomically

    whole = [
        {**one.facts(), "harness": {} if one.tasks is None else one.tasks.harness, "examples": _examples(one)}
        for one in found
    ]
    write_atomically(path, json_module.dumps(whole, indent=2, default=str) + "\n")


def _examples(one: Scored) -> dict[str, Any]:
    scores = [] if one.tasks is None else one.tasks.scores
    return {f"{score.task}, {score.metric}": score.by_example for score in scores}


def _print_one(scored: Scored, json: bool) -> None:
    ((source, found),) = scored.perplexity.items()
    if json:
        facts = {"source": source, "model": scored.model, "available_sequences": scored.available[source]}
        print_json({**asdict(found), **facts})
        return
    begun = "" if found.bos is None else f", each begun by the start token {found.bos}"
    print(f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens of {source}")
    print(f"({found.windows:,} windows of {found.length}, stride {found.stride}{begun})")


def _print_table(found: list[Scored], json: bool) -> None:
    from rankwise.evaluation import differences

    apart = differences(found[0], found[1]) if len(found) == 2 else []
    if json:
        other = {"against": found[1].facts(), "differences": apart} if len(found) == 2 else {}
        print_json({**found[0].facts(), **other})
        return
    from rankwise.reports import print_scores

    print_scores(found, apart)
