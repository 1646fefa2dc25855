"""Who works for a run: workers that were asked for, or this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from rankwise.runs import Crew, Here, clear_scratch
from rankwise.stages.at_once import rounded_at_once
from rankwise.stages.jobs import Hand
from rankwise.stages.work import Work


@contextmanager
def at_work(work: Work, *, rounding: bool = False) -> Iterator[Crew]:
    """Who does the jobs of a run, for as long as the block runs.

    Args:
        work: the run.
        rounding: whether the jobs round sites to codes, see `rounded_at_once`.
    """
    if work.crew is not None:
        yield work.crew
        return
    on_gpu = work.loaded.model.device.type != "cpu"
    at_once = rounded_at_once(work.recipe.method, work.sites, on_gpu, work.memory) if rounding else 1
    threads = torch.get_num_threads()
    with Here(Hand(work), work.run.directory, at_once) as crew:
        try:
            # Threads of one step that wait for one another would take the cores from those of the next site.
            torch.set_num_threads(1 if at_once > 1 else threads)
            yield crew
        finally:
            torch.set_num_threads(threads)


def hire(work: Work) -> Work:
    """The run with the workers that its recipe asks for; they leave when the run directory is let go.

    Raises:
        MissingPackageError: when what runs them is not installed.
        RunError: when they do not start.
        ModelError: when they find another model.
    """
    asked = work.recipe
    if asked.executor == "here":
        return work
    from rankwise.runs.on_ray import Opening, RayCrew

    model = str(Path(asked.model).resolve()) if Path(asked.model).exists() else asked.model
    arguments = {
        "recipe": asked.model_copy(update={"model": model, "output": None}).model_dump(mode="json"),
        "texts": work.texts,
        "memory": work.memory,
        "fingerprint": work.fingerprint,
    }
    address = asked.executor.partition(":")[2]
    opening = Opening("rankwise.stages.jobs:open_hand", arguments)
    crew = RayCrew(address, asked.workers, opening, work.run.directory, work.reporter)
    work.run.closing.callback(clear_scratch, work.run.directory)
    work.run.closing.callback(crew.close)
    work.reporter.note(f"{crew.workers} workers on Ray", passing=True)
    return replace(work, crew=crew)
