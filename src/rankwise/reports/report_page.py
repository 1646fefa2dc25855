"""The report as one HTML file without anything to fetch: readable on a phone, in print, in the dark, and aloud."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from rankwise.reading import UnreadableError, read_json
from rankwise.reports.drawn import chart_with_numbers, heat_map, render, versions_of
from rankwise.reports.escaping import printable
from rankwise.reports.parts import in_words
from rankwise.reports.plan_table import kept_grid
from rankwise.reports.report import Report
from rankwise.reports.table import before_and_after, ratio
from rankwise.runs import write_atomically
from rankwise.sizes import Plan, bytes_in_words

PAGE_FILE = "report.html"
SPECTRA_FILE = "spectra.json"


def report_page(
    report: Report,
    plan: Plan,
    *,
    trials: Sequence[Mapping[str, Any]] = (),
    sensitivity: Mapping[str, Any] | None = None,
    spectra: Mapping[str, Any] | None = None,
    generations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of one compression.

    Args:
        report: of it.
        plan: its plan.
        trials: of its search.
        sensitivity: what `sensitivity.json` holds, where there is one.
        spectra: by role, pairs of bits a weight and estimated loss.
        generations: `{"prompt": ..., name of a model: text, ...}` each.
    """
    recipe = report.recipe.model_dump(mode="json")
    on_gpu = any(stage.gpu_bytes is not None for stage in report.stages.values())
    return render(
        "report.html.j2",
        title=f"{printable(report.recipe.model)}, made smaller",
        architecture=report.architecture,
        how=f"{report.recipe.method.name}, {report.recipe.allocation.name}",
        verdict=report.verdict,
        tiles=_tiles(report),
        glance=before_and_after(report),
        plan=_plan_map(plan),
        groups=[(name, f"{kept:.3f}") for name, kept in report.groups.items()],
        losses=_loss_map(report),
        curves=[*_search_curves(trials), *_training_curves(report), *_iteration_curves(report)],
        repairs=[
            (
                step.step,
                in_words(step.objective_before, ".5g"),
                in_words(step.objective_after, ".5g"),
                "" if step.accepted else "undone",
                f"{step.seconds:,.1f}",
            )
            for step in report.repair
        ],
        spectra=_spectra(spectra or {}),
        sensitivity=None if sensitivity is None else _sensitivity(sensitivity),
        stage_columns=[
            *("stage", "seconds", "peak of the process", "without a file behind"),
            *(["of the GPU"] if on_gpu else []),
        ],
        stages=[
            (
                name,
                "taken over" if stage.taken_over else f"{stage.seconds:,.1f}",
                bytes_in_words(stage.peak_memory_bytes),
                "" if stage.anonymous_bytes is None else bytes_in_words(stage.anonymous_bytes),
                *(["" if stage.gpu_bytes is None else bytes_in_words(stage.gpu_bytes)] if on_gpu else []),
            )
            for name, stage in report.stages.items()
        ],
        memory=_memory(report),
        generations=[_said(each) for each in generations],
        notes=report.notes,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        versions=versions_of(report.machine),
    )


def write_report_page(folder: Path, report: Report, plan: Plan, generations: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write `report.html` beside the files that a run wrote.

    Args:
        folder: holds `trials.jsonl` and `sensitivity.json` where there are any.
        report: of the compression.
        plan: its plan.
        generations: as for `report_page`.

    Returns:
        The file.
    """
    trials = []
    if (folder / "trials.jsonl").is_file():
        trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines() if line.strip()]
    sensitivity, spectra = _beside(folder / "sensitivity.json"), _beside(folder / SPECTRA_FILE)
    page = report_page(report, plan, trials=trials, sensitivity=sensitivity, spectra=spectra, generations=generations)
    write_atomically(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _beside(path: Path) -> dict[str, Any] | None:
    """What a file holds that may lie beside a report; None where there is none that can be read."""
    try:
        return read_json(path) if path.is_file() else None
    except UnreadableError:
        return None


def _tiles(report: Report) -> list[dict[str, str]]:
    before, after = report.before, report.after
    tiles = [
        {
            "label": "size",
            "value": bytes_in_words(after.bytes),
            "note": f"{ratio(before.bytes, after.bytes)} of {bytes_in_words(before.bytes)}",
        }
    ]
    if report.bits is not None:
        asked = "" if report.bits.asked is None else f"asked {report.bits.asked:g}"
        tiles.append({"label": "bits a linear weight", "value": f"{report.bits.got:.3f}", "note": asked})
    else:
        asked = "" if report.keep.asked is None else f"asked {report.keep.asked:g}"
        tiles.append({"label": "linear weights kept", "value": f"{report.keep.got:.4f}", "note": asked})
    if report.evaluation is not None:
        dense, small = report.evaluation.dense.perplexity, report.evaluation.compressed.perplexity
        tiles.append({"label": "perplexity", "value": f"{small:.2f}", "note": f"{small / dense:.3f} of {dense:.2f}"})
    if report.speed is not None:
        tiles.append(
            {
                "label": "tokens a second",
                "value": f"{report.speed.after:.1f}",
                "note": f"{ratio(report.speed.before, report.speed.after)} of {report.speed.before:.1f}",
            }
        )
    return tiles


def _plan_map(plan: Plan) -> dict[str, Any]:
    blocks, roles, grid = kept_grid(plan)
    return heat_map("bits a weight" if plan.coded else "fraction kept", blocks, roles, grid, ".2f")


def _loss_map(report: Report) -> dict[str, Any] | None:
    """What each place loses in its method's own metric, as a share of what was there; experts are averaged."""
    by_place: dict[tuple[int, str], list[float]] = {}
    for site in report.sites.values():
        value = site.error if site.error is not None else site.dropped_energy
        if isinstance(value, float):
            by_place.setdefault((site.block, site.role), []).append(value)
    if not by_place:
        return None
    values = {place: mean(each) for place, each in by_place.items()}
    roles = list(dict.fromkeys(site.role for site in report.sites.values()))
    coded = any(site.error is not None for site in report.sites.values())
    words = (
        "Relative error of each layer's output on the calibration text, in the method's metric."
        if coded
        else "Share of the energy, in the method's metric, that each layer dropped."
    )
    blocks = sorted({block for block, _ in values})
    return {**heat_map("share lost", blocks, [r for r in roles if any(p[1] == r for p in values)], values, ".4f")} | {
        "words": words
    }


def _spectra(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The estimated loss of each role over its size; sizes without any loss are left out, as they have no logarithm."""
    series = {role: [(float(size), float(loss)) for size, loss in points if loss > 0] for role, points in found.items()}
    series = {role: points for role, points in series.items() if points}
    if not series:
        return None
    return chart_with_numbers(
        "Estimated loss of each role over its size", series, "bits a weight", "nats a token", log=True
    )


def _search_curves(trials: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    values = [(i, t.get("objective")) for i, t in enumerate(trials, 1)]
    points = [(float(i), float(value)) for i, value in values if isinstance(value, int | float)]
    if not points:
        return
    best, so_far = [], float("inf")
    for i, value in points:
        so_far = min(so_far, value)
        best.append((i, so_far))
    yield chart_with_numbers("The search", {"trial": points, "best so far": best}, "trial", "objective", log=True)


def _training_curves(report: Report) -> Iterable[dict[str, Any]]:
    steps: list[tuple[str, Any]] = [(f"repair {step.step}", step.history) for step in report.repair]
    steps += [(f"fine-tuning {i}", step.history) for i, step in enumerate(report.finetune, 1)]
    for title, history in steps:
        points = [(float(each.step), float(each.loss)) for each in history if isinstance(each.loss, int | float)]
        if points:
            yield chart_with_numbers(f"Loss, {title}", {"loss": points}, "step", "loss", log=True)


def _iteration_curves(report: Report) -> Iterable[dict[str, Any]]:
    by_role: dict[str, list[tuple[float, ...]]] = {}
    for site in report.sites.values():
        if len(site.errors) > 1:
            by_role.setdefault(site.role, []).append(site.errors)
    series = {}
    for role, every in by_role.items():
        length = min(len(errors) for errors in every)
        series[role] = [(float(i), mean(errors[i] for errors in every)) for i in range(length)]
    if series:
        yield chart_with_numbers(
            "Error by outer iteration, mean by role", series, "iteration", "relative error", log=True
        )


def _sensitivity(found: Mapping[str, Any]) -> dict[str, Any]:
    points = [p for p in found.get("points", []) if p.get("perplexity") is not None]
    roles: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point["kind"] == "role":
            roles.setdefault(point["role"], []).append((float(point["kept"]), float(point["perplexity"])))
    sites = {(p["block"], p["role"]): float(p["perplexity"]) for p in points if p["kind"] == "site"}
    dense = found.get("dense_perplexity")
    level = ("original", float(dense)) if isinstance(dense, int | float) else None
    title = "Perplexity with one role compressed"
    chart = chart_with_numbers(title, roles, "fraction of the role kept", "perplexity", log=True, level=level)
    blocks = sorted({block for block, _ in sites})
    return {
        "curves": [chart] if roles else [],
        "map": heat_map(
            "perplexity with one layer compressed", blocks, list(dict.fromkeys(r for _, r in sites)), sites, ".2f"
        ),
    }


def _memory(report: Report) -> str:
    memory = report.memory
    if memory is None:
        return ""
    words: list[str] = [f"Held as {memory.mode}."]
    shown: list[tuple[str, int | None]] = [
        ("expected", memory.expected_bytes),
        ("used", memory.used_bytes),
        ("expected of the GPU", memory.gpu_expected_bytes),
        ("used of the GPU", memory.gpu_used_bytes),
    ]
    words += [f"{label}: {bytes_in_words(size)}." for label, size in shown if size is not None]
    return " ".join(words)


def _said(each: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": each["prompt"], "texts": [(name, text) for name, text in each.items() if name != "prompt"]}
