"""The table at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from rankwise.sizes import bytes_in_words


def _on_disk(report: dict[str, Any]) -> str:
    size = report.get("bytes_on_disk")
    return "" if size is None else f"got {bytes_in_words(size)}"


def closing_table(report: dict[str, Any]) -> Table:
    """Keep asked and got, sizes and perplexity before and after, time and peak memory by stage."""
    before, after, keep = report["before"], report["after"], report["keep"]
    table = Table(title="compressed", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    bits = report.get("bits")
    if report.get("size") is not None:
        table.add_row("weight files", f"asked {bytes_in_words(report['size'])}", _on_disk(report), "")
    if bits:
        ratio = f"{bits['got'] / bits['before']:.3f}"
        got = f"{bits['got']:.4f}" if bits["asked"] is None else f"{bits['got']:.4f} of {bits['asked']:g}"
        table.add_row("bits a linear weight", f"{bits['before']:.2f}", got, ratio)
    else:
        asked = "-" if keep["asked"] is None else f"asked {keep['asked']:g}"
        table.add_row("linear weights kept", asked, f"got {keep['got']:.4f}", "")
    rows = (("parameters", "parameters"), ("linear parameters", "linear_parameters"))
    for label, key in rows:
        table.add_row(label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.3f}")
    for label, key in (("bytes", "bytes"), ("linear bytes", "linear_bytes")):
        table.add_row(label, bytes_in_words(before[key]), bytes_in_words(after[key]), f"{after[key] / before[key]:.3f}")
    if report["evaluation"]:
        dense, small = (report["evaluation"][k]["perplexity"] for k in ("dense", "compressed"))
        table.add_row("perplexity", f"{dense:.3f}", f"{small:.3f}", f"{small / dense:.3f}")
    search = report.get("search")
    if search:
        value = f"{search['objective']['value']:.4g}"
        table.add_row(f"objective, {search['trials']} trials", "", value, f"in trial {search['best_trial'] + 1}")
    for step in report.get("repair", []):
        before_step, after_step = (f"{step[key]:.4g}" for key in ("objective_before", "objective_after"))
        table.add_row(f"objective, {step['step']}", before_step, after_step, "" if step["accepted"] else "undone")
    table.add_section()
    for name, stage in report["stages"].items():
        table.add_row(name, f"{stage['seconds']:.1f} s", f"peak {bytes_in_words(stage['peak_memory_bytes'])}", "")
    return table
