"""The command that says what a run will need before it is begun."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli.common import Json, Trust, print_json
from rankwise.cli.options import put


def plan_memory(
    model: Annotated[str, typer.Argument(help="Directory or hub name; its config is all that is read.")],
    method: Annotated[str | None, typer.Option(help="As for compress.")] = None,
    keep: Annotated[float | None, typer.Option(help="As for compress.")] = None,
    bits: Annotated[float | None, typer.Option(help="As for compress.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override any key of a recipe.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Say what compress would need of memory and disk, for every way to hold the model."""
    from rankwise.recipes import recipe_from

    values: dict[str, Any] = {"model": model}
    given = {
        "method": method,
        "budget.keep": keep,
        "budget.bits": bits,
        "calibration.sequences": sequences,
        "calibration.length": length,
        "device": device,
        "trust_remote_code": trust_remote_code or None,
    }
    put(values, given, set_ or [])
    recipe = recipe_from(values, origin="command line")

    from rankwise.stages import available_memory, require_config

    found = require_config(recipe)
    free = available_memory()
    if json:
        print_json({"free_bytes": free, "needs": {mode: vars(need) for mode, need in found.items()}})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"What a run of {recipe.method.name} on {recipe.model} needs, in GB")
    for column in ("--memory", "host", "GPU", "disk", "most in"):
        table.add_column(column, justify="left" if column in ("--memory", "most in") else "right")
    for mode, need in found.items():
        sizes = [f"{size / 1e9:.2f}" for size in (need.host, need.device, need.disk)]
        table.add_row(mode, *sizes, need.worst)
    Console(width=100).print(table)
    if free is not None:
        print(f"free on this host: {free / 1e9:.2f} GB of memory")
