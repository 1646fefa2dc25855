"""The table at the end of a run."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from rankwise.reports.escaping import cell
from rankwise.reports.parts import in_words
from rankwise.reports.report import Report
from rankwise.reports.verdict import in_lines
from rankwise.sizes import bytes_in_words


def print_closing(report: Report) -> None:
    """Print what a compression ends with on standard output: the table, what was lost, and what to try next."""
    # A file or a pipe has no width: let the table take what it needs.
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(closing_table(report))
    if report.verdict is not None:
        console.print()
        for line in in_lines(report.verdict):
            console.print(line, markup=False, highlight=False)
        console.print()


def closing_table(report: Report) -> Table:
    """Keep asked and got, sizes and perplexity before and after, time and peak memory by stage."""
    keep, bits = report.keep, report.bits
    table = Table(title="compressed", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    if report.size is not None:
        got = "" if report.bytes_on_disk is None else f"got {bytes_in_words(report.bytes_on_disk)}"
        table.add_row("weight files", f"asked {bytes_in_words(report.size)}", got, "")
    if bits is not None:
        got = f"{bits.got:.4f}" if bits.asked is None else f"{bits.got:.4f} of {bits.asked:g}"
        table.add_row("bits a linear weight", f"{bits.before:.2f}", got, f"{bits.got / bits.before:.3f}")
    else:
        asked = "-" if keep.asked is None else f"asked {keep.asked:g}"
        table.add_row("linear weights kept", asked, f"got {keep.got:.4f}", "")
    for line in before_and_after(report):
        table.add_row(*line)
    if report.search is not None:
        value = in_words(report.search.objective.value, ".4g")
        best = f"in trial {report.search.best_trial + 1}"
        table.add_row(f"objective, {report.search.trials} trials", "", value, best)
    for step in report.repair:
        values = (in_words(value, ".4g") for value in (step.objective_before, step.objective_after))
        table.add_row(cell(f"objective, {step.step}"), *values, "" if step.accepted else "undone")
    table.add_section()
    for name, stage in report.stages.items():
        took = "taken over" if stage.taken_over else f"{stage.seconds:.1f} s"
        table.add_row(cell(name), took, f"peak {bytes_in_words(stage.peak_memory_bytes)}", "")
    return table


def before_and_after(report: Report) -> list[tuple[str, str, str, str]]:
    """Label, before, after and their ratio: sizes, and perplexity and speed where they were measured."""
    before, after = report.before, report.after
    counts = (
        ("parameters", before.parameters, after.parameters),
        ("linear parameters", before.linear_parameters, after.linear_parameters),
    )
    sizes = (("bytes", before.bytes, after.bytes), ("linear bytes", before.linear_bytes, after.linear_bytes))
    lines = [(label, f"{one:,}", f"{other:,}", ratio(one, other)) for label, one, other in counts]
    lines += [(label, bytes_in_words(one), bytes_in_words(other), ratio(one, other)) for label, one, other in sizes]
    if report.evaluation is not None:
        dense, small = report.evaluation.dense.perplexity, report.evaluation.compressed.perplexity
        lines.append(("perplexity", f"{dense:.3f}", f"{small:.3f}", ratio(dense, small)))
    if report.speed is not None:
        slow, fast = report.speed.before, report.speed.after
        label = "tokens/s, decoded once" if report.speed.decoded_once else "tokens/s"
        lines.append((label, f"{slow:.1f}", f"{fast:.1f}", ratio(slow, fast)))
    return lines


def ratio(before: float, after: float) -> str:
    """After over before, in words."""
    return f"{after / before:.3f}" if before else "-"
