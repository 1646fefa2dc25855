"""What `evaluate`, `compare`, `cost` and `speed` print: tables for the terminal, one model a column."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rankwise.evaluation import Operations, Scored, Speeds
from rankwise.reports.compared import ComparedModels
from rankwise.reports.escaping import cell, printable
from rankwise.sizes import bytes_in_words


def _print(table: Table) -> None:
    # A file or a pipe has no width: let the table take what it needs.
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(cell(name), justify="right")
    return table


def print_scores(found: Sequence[Scored], apart: Sequence[Mapping[str, Any]]) -> None:
    """Print perplexities and task scores; with two models, their difference and its error as well.

    Args:
        found: one or two models' scores.
        apart: what `differences` says of them.
    """
    two = len(found) == 2
    if found[0].perplexity:
        table = _table("perplexity", found[0].model, *(("against", "ratio") if two else ()))
        for text, measured in found[0].perplexity.items():
            row = [f"{measured.perplexity:.4f}"]
            if two:
                other = found[1].perplexity[text].perplexity
                row += [f"{other:.4f}", f"{measured.perplexity / other:.4f}"]
            table.add_row(cell(text), *row)
        _print(table)
    if found[0].tasks is None:
        return
    known = {(row["task"], row["metric"]): row for row in apart}
    theirs = {(s.task, s.metric): s for s in found[1].tasks.scores} if two and found[1].tasks else {}
    table = _table("task", "examples", "score", *(("against", "difference") if two else ()))
    truncated = sum(found[0].tasks.truncated.values())
    for score in found[0].tasks.scores:
        place = score.task, score.metric
        row = [f"{score.examples:,}", _with_error(score.score, score.error)]
        if two:
            row.append(_with_error(theirs[place].score, theirs[place].error) if place in theirs else "")
            row.append(_with_error(known[place]["difference"], known[place]["error"], "+") if place in known else "")
        table.add_row(cell(f"{score.task}, {score.metric}"), *row)
    _print(table)
    print("score ± standard error" + ("; the difference's is of the paired difference" if two else ""))
    if truncated:
        print(f"{truncated:,} requests were longer than the model's context and lost their beginning")


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def print_comparison(found: ComparedModels) -> None:
    """Print every table of a comparison, and what could not be made."""
    for title, header, lines in found.tables():
        table = _table(*header)
        table.title, table.title_justify = cell(title), "left"
        for line in lines:
            table.add_row(*(cell(value) for value in line))
        _print(table)
        print()
    for row in found.rows:
        if row.problem:
            print(f"{printable(found.named(row))}: {printable(row.problem)}")


def print_operations(found: Mapping[str, Operations]) -> None:
    """Print what running models takes, one column a model; the last column is the last model over the first."""
    models = list(found.values())
    table = _table("", *found, *(("ratio",) if len(models) > 1 else ()))
    tokens = models[0].tokens
    rows: list[tuple[str, list[float | None], Any]] = [
        ("parameters", [m.parameters for m in models], "{:,}".format),
        ("in the decoder's linear layers", [m.linear_parameters for m in models], "{:,}".format),
        (f"MACs of {tokens} tokens", [m.macs for m in models], lambda v: f"{v / 1e9:,.2f} G"),
        ("of them attention", [m.attention_macs for m in models], lambda v: f"{v / 1e9:,.2f} G"),
        ("weights as stored", [m.weight_bytes for m in models], bytes_in_words),
        ("weights in float32", [m.float32_bytes for m in models], bytes_in_words),
        ("keys and values, a token", [m.cache_bytes_a_token for m in models], bytes_in_words),
        (
            "keys and values, full context",
            [m.cache_bytes_a_token and m.context and m.cache_bytes_a_token * m.context for m in models],
            bytes_in_words,
        ),
    ]
    for label, values, shown in rows:
        if any(value is None for value in values):
            table.add_row(label, *("not known" if value is None else shown(value) for value in values))
            continue
        ratio = [f"{values[-1] / values[0]:.3f}" if values[0] else "-"] if len(values) > 1 else []  # type: ignore[operator]
        table.add_row(label, *(shown(value) for value in values), *ratio)
    _print(table)


def print_speeds(found: Mapping[str, Speeds], costs: Mapping[str, Operations]) -> None:
    """Print speeds, median and range, one column a model; with two, the first over the second."""
    table = _table("", *found, *(("ratio",) if len(found) > 1 else ()))
    for label, values in (
        ("prompt, tokens/s", [each.prefill for each in found.values()]),
        ("first token, ms", [each.first_token for each in found.values()]),
        ("decode, tokens/s", [each.decode for each in found.values()]),
    ):
        unit = 1000 if label.endswith("ms") else 1
        shown = [f"{unit * v.middle:,.1f} ({unit * v.least:,.1f} to {unit * v.most:,.1f})" for v in values]
        ratio = [f"{values[0].middle / values[-1].middle:.3f}"] if len(values) > 1 else []
        table.add_row(label, *shown, *ratio)
    peaks = [each.peak_bytes for each in found.values()]
    table.add_row("memory beside the weights", *("" if p is None else bytes_in_words(p) for p in peaks))
    counted = list(costs.values())
    for label, sizes in (
        ("MACs a token", [c.macs / c.tokens for c in counted]),
        ("bytes of weights", [float(c.weight_bytes) for c in counted]),
    ):
        words = bytes_in_words if label.startswith("bytes") else lambda v: f"{v / 1e9:,.3f} G"
        ratio = [f"{sizes[0] / sizes[-1]:.3f}"] if len(sizes) > 1 else []
        table.add_row(label, *(words(size) for size in sizes), *ratio)
    _print(table)
    print("median (least to most); models took turns")
