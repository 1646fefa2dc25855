"""Commands about what runs leave on the disk."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.common import Json, print_json
from rankwise.errors import RecipeError

if TYPE_CHECKING:
    from rankwise.runs import KeptRun

cache_app = typer.Typer(help="What runs have kept: finished stages, one folder a model.", no_args_is_help=True)

_DAYS = {"h": 1 / 24, "d": 1.0, "w": 7.0}


@cache_app.command("ls")
def cache_ls(json: Json = False) -> None:
    """List what is kept, the largest first."""
    from rankwise.runs import cache_root, kept_runs
    from rankwise.sizes import bytes_in_words

    found = kept_runs()
    if json:
        print_json([{"name": k.folder.name, "bytes": k.size, "stages": k.stages, "days": k.days} for k in found])
        return
    if not found:
        print(f"nothing is kept in {cache_root()}")
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    for heading in ("size", "stages", "last written"):
        table.add_column(heading, justify="right")
    for kept in found:
        when = f"{kept.days:.0f} days ago" if kept.days >= 1 else f"{24 * kept.days:.0f} hours ago"
        table.add_row(escape(kept.folder.name), bytes_in_words(kept.size), str(kept.stages), when)
    # A file or a pipe has no width.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
    print(f"{bytes_in_words(sum(kept.size for kept in found))} in {cache_root()}")


@cache_app.command("rm")
def cache_rm(
    names: Annotated[list[str], typer.Argument(help="Names of models, as `rankwise cache ls` lists them.")],
    json: Json = False,
) -> None:
    """Delete what is kept of some models. A run that needs it makes it again."""
    from rankwise.runs import kept_named

    _delete(kept_named(names), json)


@cache_app.command("prune")
def cache_prune(
    older_than: Annotated[
        str, typer.Option(help="What was last written longer ago: hours, days or weeks, such as 12h, 30d, 8w.")
    ] = "30d",
    json: Json = False,
) -> None:
    """Delete what has not been written to for a while."""
    from rankwise.runs import kept_runs

    days = _age(older_than)
    _delete([kept for kept in kept_runs() if kept.days > days], json)


def _age(text: str) -> float:
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip().lower())
    if matched is None:
        raise RecipeError(f"{text!r} is no age.", where="--older-than", remedy="write 12h, 30d or 8w")
    return float(matched[1]) * _DAYS[matched[2]]


def _delete(runs: list[KeptRun], json: bool) -> None:
    from rankwise.runs import delete_kept
    from rankwise.sizes import bytes_in_words

    def busy(kept: KeptRun) -> None:
        print(f"{kept.folder.name} is left: a run works there", file=sys.stderr)

    deleted = delete_kept(runs, busy)
    freed = sum(kept.size for kept in deleted)
    if json:
        print_json({"deleted": [kept.folder.name for kept in deleted], "bytes": freed})
        return
    for kept in deleted:
        print(f"{kept.folder.name}: {bytes_in_words(kept.size)}")
    print(f"{bytes_in_words(freed)} freed")
