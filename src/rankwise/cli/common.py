"""What the commands share: options of one meaning, progress, and JSON on standard output."""

from __future__ import annotations

import json as json_module
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rankwise.checkpoints import LoadedModel
    from rankwise.progress import Reporter

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Precision = Annotated[str, typer.Option(help="auto (float32 on a CPU), stored, or float32.")]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--dense-cache/--no-dense-cache",
        help="Decode quantised weights once and keep them, or in every pass; by default once where memory allows.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the result of another model too, where --output holds one.")
]
Executor = Annotated[
    str | None,
    typer.Option(help="here; ray has workers do the work on this machine, ray:ADDRESS on a cluster."),
]
Workers = Annotated[
    int | None, typer.Option(help="How many of them; by default one a GPU or a machine, and two on a single one.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint ships.")]
Bos = Annotated[
    str | None,
    typer.Option("--bos", help="Start token before every text: auto (as the tokenizer does), always, never."),
]


def named_executor(text: str | None, workers: int | None) -> str:
    """What `--executor` says, as a recipe has it.

    Raises:
        RecipeError: when it is none that there is, or none for so many workers.
    """
    from rankwise.recipes import recipe_from

    return recipe_from({"model": "any", "executor": text or "here", "workers": workers}, origin="--executor").executor


_reporters: list[Reporter] = []


def reporter_for(quiet: bool, lines: bool = False) -> Reporter:
    """Progress and notes on standard error, unless quiet; with `lines` a line a stage where that is no terminal."""
    from rankwise.progress import Reporter

    _reporters[:] = [Reporter(show=False if quiet else None, lines=lines)]
    return _reporters[0]


def last_reporter() -> Reporter | None:
    """The one that was made last: it knows what a command that failed was doing."""
    return _reporters[0] if _reporters else None


def load_named(name: str, device: str, precision: str, trust_remote_code: bool) -> LoadedModel:
    """The model that a word on the command line names, loaded as its options say.

    Raises:
        RecipeError: when an option is none that there is.
        ModelError: when there is no such model.
    """
    from rankwise.checkpoints import load_model
    from rankwise.device import named_device
    from rankwise.recipes import recipe_from

    recipe = recipe_from({"model": name, "device": device, "precision": precision}, origin="command line")
    return load_model(
        name, precision=precision, device=named_device(recipe.device), trust_remote_code=trust_remote_code
    )


def decode_once(model: Any, wanted: bool | None, quiet: bool = False) -> None:
    """Keep quantised weights decoded as the option says, and say what became of it on standard error."""
    from rankwise.layers import keep_decoded

    said = keep_decoded(model, wanted)
    if said is not None and wanted is None and not quiet:
        print(f"note: {said}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json_module.dumps(value, indent=2))
