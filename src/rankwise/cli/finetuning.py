"""The command that trains a compressed checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli.common import Bos, Device, Json, Overwrite, Precision, Quiet, Trust, print_json, reporter_for
from rankwise.cli.options import split_assignment


def finetune(
    model: Annotated[str, typer.Argument(help="Directory that rankwise compress wrote.")],
    data: Annotated[str, typer.Option(help="Text source; alpaca:FILE.jsonl for instructions.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory to write.")],
    method: Annotated[
        str, typer.Option(help="subspace (Bolaco, Eq. 9), lora, full-factors; lowrank for a quantised model.")
    ] = "full-factors",
    loss: Annotated[str | None, typer.Option(help="lm, or kl to the original model.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Step size; for full-factors relative to each tensor.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    merge: Annotated[str | None, typer.Option(help="For lora: grow (the rank rises) or truncate (it stays).")] = None,
    original: Annotated[str | None, typer.Option(help="The model that was compressed, if it moved.")] = None,
    length: Annotated[int | None, typer.Option(help="Most tokens an example.")] = None,
    output_only: Annotated[bool, typer.Option("--output-only", help="Learn from outputs alone.")] = False,
    held_out: Annotated[int, typer.Option(help="Examples at the end to judge by.")] = 16,
    evaluation: Annotated[str | None, typer.Option(help="Text source to score before and after.")] = None,
    bos: Bos = None,
    seed: Annotated[int, typer.Option(help="For everything drawn.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: --set rank=16")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever was begun for this output.")] = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    precision: Precision = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what compression left, and write it as a checkpoint of the same kind."""
    from rankwise.flows.finetune import finetune as run
    from rankwise.recipes import finetune_from
    from rankwise.reports import in_words

    options: dict[str, Any] = {"loss": loss, "epochs": epochs, "lr": lr, "batch_size": batch_size, "merge": merge}
    settings = {key: value for key, value in options.items() if value is not None}
    settings |= dict(split_assignment(assignment) for assignment in set_ or [])
    wanted = finetune_from(
        {
            "model": model,
            "data": data,
            "output": output,
            "method": method,
            "length": length,
            "output_only": output_only,
            "original": original,
            "held_out": held_out,
            "evaluation": evaluation,
            "bos": bos or "auto",
            "seed": seed,
            "device": device,
            "precision": precision,
            "trust_remote_code": trust_remote_code,
        },
        settings,
    )
    reporter = reporter_for(quiet, lines=True)
    reporter.facts["model"] = model
    report = run(wanted, restart=restart, overwrite=overwrite, reporter=reporter)
    if json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        step = report.finetune[-1]
        before, after = (in_words(loss, ".4f") for loss in (step.loss_before, step.loss_after))
        measure = "KL to the original" if wanted.training.loss == "kl" else "of the text itself"
        print(f"loss a token ({measure}) on {step.examples.held_out} examples held out: {before} before, {after} after")
        if not step.accepted:
            print("the loss did not fall: the training was undone, and what is written is what was read")
        if step.before is not None and step.after is not None:
            print(f"perplexity: {step.before.perplexity:.3f} before, {step.after.perplexity:.3f} after")
        trained = step.examples.trained_tokens or step.examples.tokens
        print(
            f"{step.trained_parameters:,} parameters trained on {trained:,} tokens, "
            f"{trained / max(1, step.examples.tokens):.3g} passes over {step.examples.tokens:,}"
        )
        print(f"written to {output}")
