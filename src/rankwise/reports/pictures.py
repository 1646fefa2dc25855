"""Pictures of plans, searches and sensitivity. They need matplotlib, which the `plots` extra installs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankwise.errors import MissingPackageError, OutputError
from rankwise.reading import one_line
from rankwise.reports.escaping import in_picture
from rankwise.reports.plan_table import kept_grid
from rankwise.reports.trained import TrainingStep
from rankwise.sizes import Plan

_MARKERS = {"proposed": "o", "spread": "s"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes, made without a display.

    Raises:
        MissingPackageError: when matplotlib is absent.
    """
    if not can_draw():
        raise MissingPackageError("Pictures need matplotlib.", where="picture", remedy="pip install 'rankwise[plots]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    try:
        # No date and no random names inside: the same plan gives the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "rankwise"}):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as problem:
        raise OutputError("The picture cannot be written.", where=str(path), remedy=one_line(problem)) from None


def draw_losses(path: Path, curves: Mapping[str, Sequence[TrainingStep]]) -> None:
    """Draw loss a token over steps of training, each curve named at its end.

    Args:
        path: file to write; its suffix says the format.
        curves: by name.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    figure, axes = _figure(6.0, 3.2)
    for name, rows in curves.items():
        if rows:
            (line,) = axes.plot([row.step for row in rows], [row.loss for row in rows], linewidth=1.2)
            axes.annotate(
                f" {in_picture(name)}", (rows[-1].step, rows[-1].loss), color=line.get_color(), fontsize=8, va="center"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss a token (nats)")
    _save(figure, path)


def draw_iterations(path: Path, errors: Mapping[str, Sequence[float]], roles: Mapping[str, str]) -> None:
    """Draw each site's error over outer iterations, its first one being 1; thick lines are medians of roles.

    Args:
        path: file to write; its suffix says the format.
        errors: site name -> error after each iteration.
        roles: site name -> role.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    figure, axes = _figure(7.0, 4.2)
    known = list(dict.fromkeys(roles[name] for name in errors))
    ends = []
    for number, role in enumerate(known):
        curves = [
            [e / values[0] for e in values] for name, values in errors.items() if roles[name] == role and values[0]
        ]
        if not curves:
            continue
        colour = f"C{number % 10}"
        steps = range(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.2, linewidth=0.8)
        medians = [statistics.median(c[i] for c in curves if i < len(c)) for i in range(len(curves[0]))]
        axes.plot(steps, medians, color=colour, linewidth=2)
        ends.append(((len(medians), medians[-1]), role, colour))
    axes.set_xlabel("outer iteration")
    axes.set_ylabel("error of W relative to the first iteration")
    for (x, y), role, colour in ends:
        axes.annotate(
            in_picture(role), (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=colour
        )
    _save(figure, path)


def draw_plan(path: Path, plan: Plan) -> None:
    """Draw the fraction every site keeps, or its bits a weight: blocks from left to right, roles from top to bottom.

    Args:
        path: file to write; its suffix says the format.
        plan: what to draw.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    blocks, roles, grid = kept_grid(plan)
    cell = 0.42 if len(blocks) <= 40 else 0.25
    figure, axes = _figure(2.2 + cell * len(blocks), 1.6 + 0.42 * len(roles))
    values = [[grid.get((block, role), float("nan")) for block in blocks] for role in roles]
    most = max(1.0, *grid.values()) if plan.coded else 1.0
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(roles)), [in_picture(role) for role in roles])
    axes.set_xlabel("block")
    size = (
        f"{plan.bits_a_weight:.3f} bits a weight on the average" if plan.coded else f"{plan.kept:.3f} of the whole kept"
    )
    axes.set_title(f"{size}\n({in_picture(plan.method)}, {in_picture(plan.allocation)})", fontsize=9)
    if len(blocks) <= 40:
        for row, role in enumerate(roles):
            for column, block in enumerate(blocks):
                value = grid.get((block, role))
                if value is not None:
                    text = (
                        "dense" if value >= (plan.form.number_bits if plan.coded else 1) else f"{value:.2f}".lstrip("0")
                    )
                    colour = "black" if value > 0.6 * most else "white"
                    axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    _save(figure, path)


def draw_trials(path: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """Draw a search: the objective of each trial, and the best so far.

    Args:
        path: file to write.
        trials: records of the log, in order.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    figure, axes = _figure(6.4, 3.6)
    good = [t for t in trials if not t["failed"]]
    best: list[float] = []
    for trial in good:
        best.append(min(trial["objective"], best[-1] if best else trial["objective"]))
    numbers = [t["trial"] + 1 for t in good]
    axes.step(numbers, best, where="post", color="black", linewidth=1.2, zorder=1)
    for origin, colour in (("spread", "tab:gray"), ("proposed", "tab:blue")):
        chosen = [t for t in good if t["origin"] == origin]
        if chosen:
            axes.scatter([t["trial"] + 1 for t in chosen], [t["objective"] for t in chosen], s=16, color=colour)
    for trial in good:
        if trial["origin"] not in _MARKERS:
            axes.scatter([trial["trial"] + 1], [trial["objective"]], s=24, marker="D", color="tab:orange")
            axes.annotate(
                in_picture(trial["origin"]),
                (trial["trial"] + 1, trial["objective"]),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
            )
    axes.set_yscale("log")
    _plain_numbers(axes)
    axes.set_xlabel("trial (gray: spread out; blue: proposed by the surrogate; line: best so far)")
    axes.set_ylabel("validation objective, lower is better")
    _save(figure, path)


def _plain_numbers(axes: Any) -> None:
    """Whole trials below, and on a logarithmic axis numbers as people write them, some even within one power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_role_curves(path: Path, rows: Sequence[Mapping[str, Any]], dense: float) -> None:
    """Draw perplexity over the fraction kept, one line a role, each named at its end.

    Args:
        path: file to write.
        rows: with `role`, `keep` and `perplexity`.
        dense: perplexity of the original.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    figure, axes = _figure(6.4, 4.0)
    roles = list(dict.fromkeys(row["role"] for row in rows))
    ends = []
    for role in roles:
        points = sorted((row["kept"], row["perplexity"]) for row in rows if row["role"] == role and row["perplexity"])
        if not points:
            continue
        (line,) = axes.plot([k for k, _ in points], [p for _, p in points], marker="o", markersize=3)
        ends.append((points[0], role, line.get_color()))
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("original", (1.0, dense), fontsize=8, xytext=(-4, 4), textcoords="offset points", ha="right")
    axes.set_yscale("log")
    axes.set_xlim(min((x for (x, _), _, _ in ends), default=0) - 0.08, 1.0)
    _name_ends(axes, ends)
    axes.set_xlabel("fraction of this role kept, everything else dense")
    axes.set_ylabel("perplexity on the validation samples")
    _save(figure, path)


def _name_ends(axes: Any, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Write each line's name left of its left end, moved apart where ends are close."""
    from math import log

    low, high = (log(limit) for limit in axes.get_ylim())
    taken = -1.0
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        place = max((log(y) - low) / (high - low), taken + 0.05)
        taken = place
        shift = (place - (log(y) - low) / (high - low)) * axes.bbox.height
        axes.annotate(
            in_picture(name),
            (x, y),
            xytext=(-6, shift),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=colour,
        )


def draw_site_map(path: Path, rows: Sequence[Mapping[str, Any]], dense: float, keep: float) -> None:
    """Draw how much perplexity rises when one site alone keeps a fraction: blocks by roles.

    Args:
        path: file to write.
        rows: with `block`, `role` and `perplexity`.
        dense: perplexity of the original.
        keep: the fraction.

    Raises:
        MissingPackageError: when matplotlib is absent.
        OutputError: when the file cannot be written.
    """
    from math import log10

    blocks = sorted({row["block"] for row in rows})
    roles = list(dict.fromkeys(row["role"] for row in rows))
    figure, axes = _figure(2.2 + 0.42 * len(blocks), 1.6 + 0.42 * len(roles))
    rise = {(r["block"], r["role"]): 100 * (r["perplexity"] / dense - 1) for r in rows if r["perplexity"] is not None}
    values = [
        [log10(max(rise[block, role], 1e-2)) if (block, role) in rise else float("nan") for block in blocks]
        for role in roles
    ]
    axes.imshow(values, cmap="magma_r", aspect="auto")
    middle = sum(v for row in values for v in row if v == v) / max(1, sum(v == v for row in values for v in row))
    for row, role in enumerate(roles):
        for column, block in enumerate(blocks):
            if (block, role) in rise:
                colour = "white" if values[row][column] > middle + 0.4 else "black"
                text = f"{rise[block, role]:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(roles)), [in_picture(role) for role in roles])
    axes.set_xlabel("block")
    axes.set_title(f"rise of perplexity in %,\none site at {keep:g} kept, all others dense", fontsize=9)
    _save(figure, path)
