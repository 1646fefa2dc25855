"""Charts as SVG text for pages: nothing to fetch, colours from the page, and the numbers beside them for all who read.

Every chart has a title and a description that say what it shows; the page puts its numbers into a table below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
COLOURS = 8
"""Different lines that the page's style knows; further ones begin again, dashed."""

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        steps = (1, 2, 5) if high / low < 300 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [s * 10.0**p for p in powers for s in steps if low * 0.999 <= s * 10.0**p <= high * 1.001]
        if len(found) >= 2:
            return found
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4)) if span else 1.0
    step *= next((s for s in (1, 2, 5, 10) if span / (s * step) <= 6), 10)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_chart(
    title: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Lines over a common axis.

    Args:
        title: what it shows, for screen readers.
        series: points by name, drawn in order of x.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        log: the vertical axis by ratio.
        level: a name and a value that holds everywhere, such as the original's.
    """
    everything = [point for points in series.values() for point in points]
    if not everything:
        return Markup("")
    xs = [x for x, _ in everything]
    ys = [y for _, y in everything] + ([level[1]] if level else [])
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    log = log and y_low > 0
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_low == y_high:
        y_low, y_high = y_low - (abs(y_low) or 1) * 0.05, y_high + (abs(y_high) or 1) * 0.05
    scale = math.log if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low)
        up = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title),
        Markup("<title>{}</title><desc>{}</desc>").format(
            title, f"{y_label} over {x_label}, {len(series)} lines; the numbers are in the table below"
        ),
    ]
    for value in _ticks(y_low, y_high, log):
        _, y = place(x_low, value)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT - 6, y + 4, _shown(value))
        )
    for value in _ticks(x_low, x_high, False):
        x, _ = place(value, y_low)
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x, _HEIGHT - _BOTTOM + 18, _shown(value)
            )
        )
    parts.append(
        Markup(
            '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>'
            '<text class="label" transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, (_TOP + _HEIGHT - _BOTTOM) / 2, y_label)
    )
    if level is not None:
        _, y = place(x_low, level[1])
        parts.append(
            Markup(
                '<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT + 6, y - 5, level[0])
        )
    for i, points in enumerate(series.values()):
        placed = [place(x, y) for x, y in sorted(points)]
        style = f"c{i % COLOURS}" + (" dashed" if i >= COLOURS else "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(style, path))
        if len(placed) <= 24:
            dots = (Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, *p) for p in placed)
            parts.append(Markup("").join(dots))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend(names: Sequence[str]) -> Markup:
    """The names of a chart's lines with their colours."""
    items = [
        Markup('<li><span class="key c{}{}"></span>{}</li>').format(i % COLOURS, " dashed" if i >= COLOURS else "", n)
        for i, n in enumerate(names)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def shade(value: float | None, low: float, high: float) -> str:
    """How strongly a cell of a map is coloured, in percent, as a style of the page takes it."""
    if value is None or not math.isfinite(value):
        return "0"
    return f"{100 * (value - low) / (high - low):.0f}" if high > low else "50"
