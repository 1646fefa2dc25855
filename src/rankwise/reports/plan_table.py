"""Plans as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from rankwise.models import place_of
from rankwise.sizes import QuantizedRank, Rank, RankPlan

Grid = dict[tuple[int, str], float]


def kept_grid(plan: RankPlan) -> tuple[list[int], list[str], Grid]:
    """The fraction kept by block and role, bits a weight where sites are quantised; experts are added up.

    Returns:
        Blocks, roles, and fraction by (block, role).
    """
    whole: Grid = {}
    kept: Grid = {}
    for name, (m, n) in plan.shapes.items():
        place = place_of(name)
        whole[place] = whole.get(place, 0) + m * n
        kept[place] = kept.get(place, 0) + (plan.site_bits(name) if plan.q_bits else plan.cost(name))
    blocks = sorted({block for block, _ in whole})
    roles = list(dict.fromkeys(role for _, role in whole))
    return blocks, roles, {place: kept[place] / whole[place] for place in whole}


def plan_table(plan: RankPlan) -> Table:
    """Ranks by block (rows) and role (columns), with the fraction kept; a dense site says so.

    Of a quantised site: bits of Q, rank beside it if any, and bits a weight in all.
    """
    blocks, roles, grid = kept_grid(plan)
    ranks: dict[tuple[int, str], list[str | None]] = {}
    for name, rank in plan.ranks.items():
        label = str(rank)
        if name in plan.q_bits:
            label = f"{plan.q_bits[name]}" + (f" + {rank}" if rank else "")
        ranks.setdefault(place_of(name), []).append(None if rank is None else label)
    table = Table(show_edge=False, pad_edge=False, title_justify="left")
    table.title = "bits of Q + rank of L R (bits a weight)" if plan.q_bits else "rank (fraction kept)"
    table.add_column("block", justify="right")
    for role in roles:
        table.add_column(role, justify="right")
    for block in blocks:
        cells = []
        for role in roles:
            here = ranks.get((block, role), [])
            if not here:
                cells.append("")
            elif all(rank is None for rank in here):
                cells.append("dense")
            else:
                shown = here[0] if len(here) == 1 else f"{len(here)} sites"
                cells.append(f"{shown} ({grid[block, role]:.2f})")
        table.add_row(str(block), *cells)
    return table


def plan_facts(plan: RankPlan) -> list[tuple[str, str]]:
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
    return facts


def _size(plan: RankPlan) -> tuple[str, str]:
    if plan.q_bits and plan.form is not None:
        parts = (
            f"Q {plan.form.codebook}, L R at {plan.form.lr_bits} bits, {'' if plan.form.hadamard else 'not '}rotated"
        )
        return "size", f"{plan.bits_a_weight:.4f} bits a weight ({parts})"
    return "kept", f"{plan.kept:.4f} of {plan.dense_parameters:,} ({plan.kept_parameters:,} numbers, {plan.storage})"


def _short(rank: Rank) -> str:
    if isinstance(rank, QuantizedRank):
        return f"{rank.q_bits} bits + {int(rank)}"
    return "dense" if rank is None else str(rank)


def plan_difference(first: RankPlan, second: RankPlan) -> Table:
    """Sites whose rank differs between two plans, and by how many parameters.

    Args:
        first: one plan.
        second: another for the same shapes.
    """
    table = Table(show_edge=False, pad_edge=False)
    for column in ("site", "first", "second", "parameters"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name in first.shapes:
        a, b = first.setting(name), second.setting(name)
        if a != b:
            change = second.cost(name) - first.cost(name)
            table.add_row(name, _short(a), _short(b), f"{change:+,}")
    return table
