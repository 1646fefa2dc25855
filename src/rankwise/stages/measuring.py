"""Statistics: what calibration measures at every site, in this process or by workers, a shard of the sequences each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rankwise.allocation import Looks
from rankwise.models import Site
from rankwise.runs import Job, Stage
from rankwise.stages.chosen import watched
from rankwise.stages.keys import calibration_key
from rankwise.stages.routed import note_experts
from rankwise.stages.work import Work
from rankwise.statistics import HIDDEN_GB, Statistic, Store, Totals, collecting, save_totals, shards
from rankwise.statistics.files import load_totals

Missing = list[Statistic]
"""Statistics that no finished stage holds."""

Known = Callable[[Statistic, str], bool]
"""Whether the totals of a statistic at a stream, by its key, are there already."""


def requests_of(work: Work) -> tuple[Statistic, ...]:
    """What the method, and the allocation by its losses, ask to be measured."""
    method = work.recipe.method
    return method.requests() + (method.plan_requests() if work.looks >= Looks.LOSSES else ())


def measured_key(work: Work) -> dict[str, Any]:
    """What depends on the statistics of a site depends on this: the calibration, and how sites had to share memory."""
    sites, _ = _watched(work)
    shared = {statistic.name: statistic.shared(statistic.streams(sites)) for statistic in requests_of(work)}
    found = {name: facts for name, facts in shared.items() if facts}
    return {**calibration_key(work), **({"shared": found} if found else {})}


def collect_statistics(work: Work) -> Store:
    """Collect what the method asks for and no finished stage holds: one pass for all of it.

    Raises:
        NotFiniteError: naming the layer.
    """
    sites, beside = _watched(work)
    store = collect_requests(work, requests_of(work), sites, beside)
    note_experts(work.sites, store, work.reporter)
    return store


def finished_store(work: Work) -> Store:
    """The statistics that `collect_statistics` collected."""
    sites, beside = _watched(work)
    stages = _stages(work, requests_of(work), {**calibration_key(work), **beside})
    return Store({statistic: stage.folder for statistic, stage in stages.items()}, sites)


def _watched(work: Work) -> tuple[list[Site], dict[str, Any]]:
    """The sites at which statistics are collected, and, where these are not all, what stages depend on besides."""
    sites = watched(work.sites, work.left_out)
    return sites, {"sites": sorted(site.name for site in sites)} if len(sites) < len(work.sites) else {}


def _stages(work: Work, requests: Sequence[Statistic], common: Mapping[str, Any]) -> dict[Statistic, Stage]:
    return {
        statistic: work.stage(f"statistics-{statistic.name}", {**common, "statistic": statistic.settings()})
        for statistic in requests
    }


def collect_requests(
    work: Work, requests: Sequence[Statistic], sites: Sequence[Site], beside: Mapping[str, Any] | None = None
) -> Store:
    """Collect some statistics at some sites, where no finished stage holds them.

    Args:
        work: the run.
        requests: what is collected.
        sites: where.
        beside: what their stages depend on besides; where these are not all sites, which they are.

    Raises:
        NotFiniteError: naming the layer.
    """
    common = {**calibration_key(work), **(beside or {})}
    stages = _stages(work, requests, common)
    missing = [statistic for statistic, stage in stages.items() if not stage.taken_over()]
    if missing:
        folders = {statistic: stages[statistic].begun() for statistic in missing}

        def known(statistic: Statistic, key: str) -> bool:
            return folders[statistic].has(f"{key}.safetensors")

        by_shard = work.crew is not None
        found = _of_shards(work, missing, common, known) if by_shard else _of_all(work, missing, common, known, sites)
        for statistic, key, totals in found:
            with folders[statistic].writing(f"{key}.safetensors") as path:
                save_totals(path, totals)
        for statistic in missing:
            with stages[statistic].making():
                _note(work, statistic, sites)
    return Store({statistic: stage.folder for statistic, stage in stages.items()}, sites)


def _note(work: Work, statistic: Statistic, sites: Sequence[Site]) -> None:
    """Say again what a statistic says of how it adds, so that it is kept with the stage of this one alone."""
    count = len(work.texts.calibration.ids) if statistic.labels is None else work.gradient_sequences
    statistic.sums(statistic.streams(sites), count, work.reporter)


def _of_all(
    work: Work, missing: Missing, common: Mapping[str, Any], known: Known, sites: Sequence[Site]
) -> Iterator[tuple[Statistic, str, Totals]]:
    """What one pass over all sequences gives in this process."""
    snapshot = work.stage("snapshot", {**common, "statistics": [s.settings() for s in missing]})
    yield from collecting(
        work.loaded.model,
        sites,
        work.texts.calibration.ids,
        missing,
        batch_size=work.recipe.calibration.batch_size,
        seed=work.recipe.seed,
        snapshot=snapshot.partial,
        hidden_gb=0.0 if work.memory == "disk" else HIDDEN_GB,
        known=known,
        reporter=work.reporter,
        gradient_sequences=work.gradient_sequences,
    )
    snapshot.discard()


def _of_shards(
    work: Work, missing: Missing, common: Mapping[str, Any], known: Known
) -> Iterator[tuple[Statistic, str, Totals]]:
    """What workers give, a shard of the sequences each, added in the order of the sequences."""
    made = _made_shards(work, missing, common)
    for number, statistic in enumerate(missing):
        for key in (each for each in _keys(made, number) if not known(statistic, each)):
            total: Totals | None = None
            for file in (stage.folder / str(number) / f"{key}.safetensors" for stage in made):
                # An expert may have seen no token of a shard.
                if file.exists():
                    read = load_totals(file, statistic.totals)
                    total = read if total is None else total.merge(read)
            assert total is not None
            yield statistic, key, total
    for stage in made:
        shutil.rmtree(stage.folder)


def _made_shards(work: Work, missing: Missing, common: Mapping[str, Any]) -> list[Stage]:
    """A finished stage for every shard."""
    assert work.crew is not None
    total, length = work.texts.calibration.ids.shape
    settings = [statistic.settings() for statistic in missing]
    settled = work.recipe.calibration.batch_size, missing, work.crew.workers, work.gradient_sequences
    parts = shards(total, length, *settled)
    made = [work.stage("shard", {**common, "statistics": settings, "sequences": part}) for part in parts]
    left = [(part, stage) for part, stage in zip(parts, made, strict=True) if not stage.taken_over()]
    asked = requests_of(work)
    jobs = [
        Job(
            "rankwise.stages.jobs:measure_shard",
            {"numbers": [asked.index(statistic) for statistic in missing], "first": first, "stop": stop},
            label=f"sequences {first} to {stop}",
        )
        for (first, stop), _ in left
    ]
    done = len(parts) - len(left)
    with work.reporter.counting("calibration by shard", total=len(parts), done=done) as advance:
        for job, (_, stage), found in zip(jobs, left, work.crew.results(jobs), strict=True):
            with stage.making() as folder:
                for name in found.files:
                    with folder.writing(name) as path:
                        found.put(name, path)
            advance(f"calibration, {job.label}")
    return made


def _keys(made: Sequence[Stage], number: int) -> list[str]:
    """Streams of which any shard holds one statistic."""
    seen = {path.stem: None for stage in made for path in sorted((stage.folder / str(number)).glob("*.safetensors"))}
    return list(seen)
