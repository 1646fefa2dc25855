"""Commands about files: plans and ready recipes."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.common import Json, Trust, print_json
from rankwise.errors import ModelError, RankwiseError

if TYPE_CHECKING:
    from rankwise.recipes import Recipe
    from rankwise.sizes import Plan

recipes_app = typer.Typer(help="Ready recipes: whole runs as YAML.", no_args_is_help=True)
plan_app = typer.Typer(help="Plans: the cut of every site, as a file.", no_args_is_help=True)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="plan.json")],
    picture: Annotated[Path | None, typer.Option(help="Also draw it: FILE.svg or FILE.png.")] = None,
    json: Json = False,
) -> None:
    """Print what a plan was made for, and the cut of every block and role."""
    from rankwise.sizes import Plan

    plan = Plan.load(file)
    if picture is not None:
        from rankwise.reports import draw_plan

        draw_plan(picture, plan)
    if json:
        print_json({**plan.model_dump(mode="json"), "kept": plan.kept, "kept_bits": plan.kept_bits})
        return
    from rich.console import Console

    from rankwise.reports import plan_facts, plan_tables

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    for label, text in plan_facts(plan):
        print(textwrap.fill(f"{label:<14} {text}", width, subsequent_indent=" " * 15, break_on_hyphens=False))
    print()
    # A file or a pipe has no width: there one table takes what it needs.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    for number, table in enumerate(plan_tables(plan, console)):
        console.print(*([""] if number else []), table, sep="\n")


@plan_app.command("diff")
def plan_diff(
    first: Annotated[Path, typer.Argument(help="plan.json")],
    second: Annotated[Path, typer.Argument(help="Another plan.json")],
    json: Json = False,
) -> None:
    """Print the sites whose cut differs between two plans. Exit status 1 when any does."""
    from rankwise.sizes import Plan, same_shapes

    one, other = Plan.load(first), Plan.load(second)
    same_shapes(one, other, str(first), str(second))
    differing = [name for name in one.cuts if one.cuts[name] != other.cuts[name]]
    if json:
        print_json({name: [asdict(one.cuts[name]), asdict(other.cuts[name])] for name in differing})
    elif not differing:
        print("the plans are the same")
    else:
        from rich.console import Console

        from rankwise.reports import plan_difference

        Console(width=None if sys.stdout.isatty() else 120).print(plan_difference(one, other))
        print(f"{len(differing)} of {len(one.cuts)} sites differ; {_size(one)} and {_size(other)}")
    if differing:
        raise typer.Exit(1)


def _size(plan: Plan) -> str:
    return f"{plan.bits_a_weight:.4f} bits a weight" if plan.coded else f"kept {plan.kept:.4f}"


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the ready recipes."""
    from rankwise.recipes import ready_recipes

    for name, text in ready_recipes().items():
        first = text.splitlines()[0].removeprefix("#").strip()
        print(f"{name:<24} {first}")


def _valid(name: str, trusted: bool) -> Recipe:
    """A recipe with every default; its model may be left to the command line.

    Raises:
        RecipeError: when it is not valid, or names code in a file that is not trusted.
    """
    from rankwise.cli.options import require_trusted_code
    from rankwise.recipes import read_recipe, recipe_from

    values = read_recipe(name)
    require_trusted_code(values, trusted, name, {})
    return recipe_from({"model": "MODEL", **values}, origin=name)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A ready recipe, or a YAML file.")], trust_remote_code: Trust = False
) -> None:
    """Print a recipe with every default filled in, as YAML."""
    import yaml

    valid = _valid(name, trust_remote_code)
    print(yaml.safe_dump(valid.model_dump(mode="json"), sort_keys=False), end="")


@recipes_app.command("validate")
def recipes_validate(
    files: Annotated[list[str], typer.Argument(help="YAML files, or names of ready recipes.")],
    trust_remote_code: Trust = False,
) -> None:
    """Check recipes, and that the files they name are there; the first problem of each goes to standard error."""
    bad = False
    for name in files:
        try:
            recipe = _valid(name, trust_remote_code)
            recipe.require_files()
            if recipe.model.startswith((".", "/")) and not os.path.exists(recipe.model):
                raise ModelError("There is no such model.", where=recipe.model, remedy="check the key model")
            print(f"{name}: valid")
        except RankwiseError as problem:
            bad = True
            print(f"error: {problem}", file=sys.stderr)
    if bad:
        raise typer.Exit(2)
