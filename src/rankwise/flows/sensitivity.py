"""How much each part of a model bears: one role, or one site, compressed at a time (Bolaco, Figures 1 and 5).

The flow is that of `compress` up to the outlooks; then every point is one forward pass over the validation samples.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.models import Site
    from rankwise.progress import Reporter
    from rankwise.recipes import Recipe

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Point:
    """One thing to compress alone.

    Attributes:
        kind: `role` (all its sites) or `site`.
        role: which role.
        block: which block; None for all.
        keep: fraction of it to keep.
    """

    kind: str
    role: str
    block: int | None
    keep: float

    def covers(self, site: Site) -> bool:
        """Whether a site is one of those compressed."""
        return site.role == self.role and self.block in (None, site.block)

    def fractions(self, sites: Sequence[Site]) -> dict[str, float | None]:
        """What is kept of all sites: all but for this point's."""
        return {site.name: self.keep if self.covers(site) else None for site in sites}


def points_of(sites: Sequence[Site], fractions: Sequence[float], site_fraction: float) -> list[Point]:
    """Every role over the fractions, then every site at one fraction."""
    roles = list(dict.fromkeys(site.role for site in sites))
    places = list(dict.fromkeys((site.block, site.role) for site in sites))
    return [Point("role", role, None, keep) for role in roles for keep in fractions] + [
        Point("site", role, block, site_fraction) for block, role in places
    ]


def sensitivity(
    recipe: Recipe,
    output: Path | str,
    *,
    fractions: Sequence[float] = FRACTIONS,
    site_fraction: float = 0.5,
    run_directory: Path | str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure, and write `sensitivity.json`, `sensitivity.csv` and (with matplotlib) two figures.

    Args:
        recipe: model, method, calibration, validation and objective; its budget gives the rank multiple only.
        output: directory to write; made if absent.
        fractions: kept fractions for the roles.
        site_fraction: kept fraction for single sites.
        run_directory: where finished stages and points are kept; as for `compress`.
        overwrite: replace what was measured of another model too, where `output` holds that.
        reporter: told about progress.

    Returns:
        What `sensitivity.json` holds.

    Raises:
        RankwiseError: for anything the user can mend; points that are finished stay.
    """
    from rankwise import stages
    from rankwise.allocation import TrialLog, finite, nearest_cuts
    from rankwise.checkpoints import check_model, load_model
    from rankwise.device import named_device
    from rankwise.errors import RecipeError
    from rankwise.progress import Reporter
    from rankwise.runs import Run, default_run_directory, replacing, write_atomically

    for fraction in (*fractions, site_fraction):
        if not 0 < fraction < 1:
            raise RecipeError(
                f"A kept fraction of {fraction:g} is not between 0 and 1.",
                where="fractions",
                remedy="use numbers such as 0.2,0.5,0.8",
            )
    if not recipe.method.keeps_factors or recipe.method.prunes:
        raise RecipeError(
            f"{recipe.method.name} has no kept fractions to vary.",
            where="method",
            remedy="use a method of low-rank factors, such as bolaco or two_sided",
        )
    recipe.require_files()
    if not overwrite:
        check_model(Path(output) / "sensitivity.json", recipe.model)
    reporter = reporter or Reporter(show=False)
    run = Run(Path(run_directory) if run_directory is not None else default_run_directory(recipe.model), reporter)
    folder = _output_folder(Path(output))
    with run.locked():
        memory = stages.chosen_memory(recipe, None)
        with reporter.stage("load"):
            loaded = load_model(
                recipe.model,
                precision=recipe.precision,
                device=named_device(recipe.device),
                trust_remote_code=recipe.trust_remote_code,
                files=run.directory if memory in ("blocks", "disk") else None,
            )
            texts = stages.read_texts(recipe, loaded, reporter, validate=True)
            work = stages.begin(recipe, run, loaded, texts, reporter, memory)
        with reporter.stage("statistics"):
            store = stages.collect_statistics(work)
        outlooks = stages.Outlooks(work, store)
        with reporter.stage("outlooks"):
            outlooks.look()
        samples = stages.select_samples(work, outlooks)
        free = [site for site in work.sites if site.name not in work.left_out]
        points = points_of(free, fractions, site_fraction)
        key = {**stages.objective_key(work, samples), "budget": recipe.budget.model_dump(), **stages.chosen_key(work)}
        stage = work.stage("sensitivity", key)
        log = TrialLog(stage.log("points.jsonl"), stage.key, reporter)
        known = {(r["kind"], r["role"], r["block"], r["keep"]): r for r in log.records}
        labels = {site.name: site.name for site in work.sites}
        with reporter.stage("points"), stages.judging(work, outlooks.of, samples) as objective:
            left = [p for p in points if (p.kind, p.role, p.block, p.keep) not in known]
            done = len(points) - len(left)
            for point in reporter.track(left, "sensitivity", total=len(points), done=done):
                cuts = nearest_cuts(work.problem, point.fractions(work.sites))
                value, perplexity, kl = objective(cuts)
                of_sites = work.problem.kept_by(labels, cuts)
                touched = [site for site in free if point.covers(site)]
                kept = sum(of_sites[s.name] * s.parameters for s in touched) / sum(s.parameters for s in touched)
                row = {
                    "kind": point.kind,
                    "role": point.role,
                    "block": point.block,
                    "keep": point.keep,
                    "kept": kept,
                    "perplexity": finite(perplexity),
                    "kl": finite(kl),
                    "objective": finite(value),
                }
                log.append(row)
                known[(point.kind, point.role, point.block, point.keep)] = row
            dense = math.exp(objective.dense_nll)
    rows = [known[(p.kind, p.role, p.block, p.keep)] for p in points]
    found = {
        "format": "rankwise-sensitivity/1",
        "model_fingerprint": work.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "dense_perplexity": dense,
        "points": rows,
    }
    write_atomically(folder / "sensitivity.json", json.dumps(found, indent=2) + "\n")
    with replacing(folder / "sensitivity.csv") as fresh, fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _draw(folder, rows, dense, site_fraction, reporter)
    return found


def _output_folder(folder: Path) -> Path:
    from rankwise.runs import make_writable

    make_writable(folder, "give another --output")
    return folder


def _draw(
    folder: Path, rows: Sequence[Mapping[str, Any]], dense: float, site_fraction: float, reporter: Reporter
) -> None:
    from rankwise.reports import can_draw, draw_role_curves, draw_site_map

    if not can_draw():
        reporter.note("no figures are drawn: matplotlib is not installed (pip install 'rankwise[plots]')")
        return
    draw_role_curves(folder / "roles.svg", [r for r in rows if r["kind"] == "role"], dense)
    draw_site_map(folder / "sites.svg", [r for r in rows if r["kind"] == "site"], dense, site_fraction)


__all__ = ["FRACTIONS", "Point", "points_of", "sensitivity"]
