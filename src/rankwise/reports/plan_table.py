"""Plans as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rankwise.models import places_of
from rankwise.reports.escaping import cell, printable
from rankwise.sizes import Cut, Plan

Grid = dict[tuple[int, str], float]


def kept_grid(plan: Plan) -> tuple[list[int], list[str], Grid]:
    """The fraction kept by block and role, bits a weight where sites are quantised; experts are added up.

    Returns:
        Blocks, roles, and fraction by (block, role).
    """
    whole: Grid = {}
    kept: Grid = {}
    places = places_of(plan.shapes)
    for name, (m, n) in plan.shapes.items():
        place = places[name]
        m, n = plan.originals.get(name, (m, n))
        whole[place] = whole.get(place, 0) + m * n
        unit = 1 if plan.coded else plan.form.number_bits
        kept[place] = kept.get(place, 0) + plan.site_bits(name) / unit
    blocks = sorted({block for block, _ in whole})
    roles = list(dict.fromkeys(role for _, role in whole))
    return blocks, roles, {place: kept[place] / whole[place] for place in whole}


def plan_tables(plan: Plan, console: Console) -> list[Table]:
    """The table of a plan, in as many tables of some roles each as fit the width of a console."""
    tables: list[Table] = []
    left = kept_grid(plan)[1]
    boundless = console.options.update(max_width=1 << 14)
    while left:
        count = len(left)
        while count > 1 and console.measure(plan_table(plan, left[:count]), options=boundless).maximum > console.width:
            count -= 1
        tables.append(plan_table(plan, left[:count]))
        left = left[count:]
    return tables


def plan_table(plan: Plan, some: Sequence[str] | None = None) -> Table:
    """Ranks by block (rows) and role (columns), with the fraction kept; a dense site says so.

    Of a quantised site: bits of Q, rank beside it if any, and bits a weight in all.

    Args:
        plan: what to show.
        some: roles to show; all by default.
    """
    blocks, roles, grid = kept_grid(plan)
    roles = roles if some is None else list(some)
    cuts: dict[tuple[int, str], list[Cut]] = {}
    places = places_of(plan.shapes)
    for name, cut in plan.cuts.items():
        cuts.setdefault(places[name], []).append(cut)
    table = Table(show_edge=False, pad_edge=False, title_justify="left")
    table.title = "bits of Q + rank of L R (bits a weight)" if plan.coded else "rank (fraction kept)"
    table.add_column("block", justify="right")
    for role in roles:
        table.add_column(cell(role), justify="right")
    for block in blocks:
        cells = []
        for role in roles:
            here = cuts.get((block, role), [])
            if not here:
                cells.append("")
            elif all(cut.dense for cut in here):
                # What lost units, or directions, is whole and smaller.
                cells.append(f"dense ({grid[block, role]:.2f})" if plan.originals else "dense")
            else:
                shown = str(here[0]) if len(here) == 1 else f"{len(here)} sites"
                cells.append(f"{shown} ({grid[block, role]:.2f})")
        table.add_row(str(block), *cells)
    return table


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """What a plan was made for and from, as pairs of label and text."""
    settings = ", ".join(f"{key} {value}" for key, value in plan.method_settings.items())
    facts = [
        ("architecture", plan.architecture),
        ("model", (plan.fingerprint or "unknown")[:16]),
        ("method", f"{plan.method} ({settings})" if settings else plan.method),
        ("allocation", plan.allocation if plan.space is None else f"{plan.allocation}:{plan.space}"),
        _size(plan),
        ("rank multiple", str(plan.rank_multiple)),
    ]
    if plan.objective is not None:
        facts.append(("objective", ", ".join(f"{key} {value:.5g}" for key, value in plan.objective.items())))
    if plan.coordinates:
        facts.append(("point", ", ".join(f"{key} {value:.3g}" for key, value in plan.coordinates.items())))
    if plan.groups:
        facts.append(("kept by group", ", ".join(f"{key} {value:.3f}" for key, value in plan.groups.items())))
    return [(label, printable(text)) for label, text in facts]


def _size(plan: Plan) -> tuple[str, str]:
    form = plan.form
    if plan.coded:
        parts = f"Q {form.codebook}, {'' if form.hadamard else 'not '}rotated, low rank alone {form.storage}"
        return "size", f"{plan.bits_a_weight:.4f} bits a weight ({parts})"
    numbers = plan.kept_bits // form.number_bits
    return "kept", f"{plan.kept:.4f} of {plan.weights:,} ({numbers:,} numbers, {form.storage})"


def plan_difference(first: Plan, second: Plan) -> Table:
    """Sites whose cut differs between two plans, and by how many bits.

    Args:
        first: one plan.
        second: another for the same shapes.
    """
    table = Table(show_edge=False, pad_edge=False)
    for column in ("site", "first", "second", "bits"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name in first.shapes:
        a, b = first.cuts[name], second.cuts[name]
        if a != b:
            change = second.site_bits(name) - first.site_bits(name)
            table.add_row(cell(name), str(a), str(b), f"{change:+,}")
    return table
