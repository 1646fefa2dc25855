"""What pages share: the templates, maps of blocks and roles, charts with their numbers, and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from rankwise.reports.charts import legend, line_chart, shade
from rankwise.reports.parts import Machine

_MOST_POINTS = 400
"""Points of a line at most; longer ones are thinned."""


@cache
def _pages() -> Environment:
    return Environment(
        loader=PackageLoader("rankwise.reports", "pages"),
        autoescape=select_autoescape(["j2"], default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A page from one of the templates in `pages/`."""
    return _pages().get_template(template).render(**values)


def versions_of(machine: Machine) -> list[tuple[str, str]]:
    """Where a run took place and what it ran with, line by line."""
    return [(name, str(value)) for name, value in machine.model_dump().items() if value is not None]


def heat_map(
    caption: str, blocks: Sequence[int], roles: Sequence[str], values: Mapping[tuple[int, str], float], shown: str
) -> dict[str, Any]:
    """Blocks by roles, each cell coloured by how much it is of the largest.

    Args:
        caption: what the numbers are.
        blocks: lines.
        roles: columns.
        values: by block and role.
        shown: format of a number.
    """
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 0.0)
    lines = []
    for block in blocks:
        cells = []
        for role in roles:
            value = values.get((block, role))
            cells.append({"text": "" if value is None else f"{value:{shown}}", "shade": shade(value, low, high)})
        lines.append({"block": block, "cells": cells})
    return {"caption": caption, "roles": list(roles), "lines": lines}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, len(points) // _MOST_POINTS)
    return [*points[::step], *([points[-1]] if (len(points) - 1) % step else [])]


def chart_with_numbers(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> dict[str, Any]:
    """A chart, and its numbers as a table: one line a value of x. Arguments as for `line_chart`."""
    series = {name: _thinned(points) for name, points in series.items()}
    xs = sorted({x for points in series.values() for x, _ in points})
    known = {name: dict(points) for name, points in series.items()}
    lines = [[f"{x:g}", *(f"{known[n][x]:.5g}" if x in known[n] else "" for n in series)] for x in xs]
    if level is not None:
        lines.append([level[0], *([f"{level[1]:.5g}"] * len(series))])
    return {
        "title": title,
        "svg": line_chart(title, series, x_label, y_label, log=log, level=level),
        "legend": legend(list(series)),
        "names": list(series),
        "header": [x_label, *series],
        "lines": lines,
    }
