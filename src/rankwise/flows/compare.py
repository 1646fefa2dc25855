"""Several ways to make one model smaller, at several sizes, scored under one protocol, the original first.

Every cell is a run of `compress` in one run directory, so that statistics and outlooks are made once for all that need
the same. Rows are kept as they come: the same command goes on after a stop, and with further ways or sizes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.progress import Reporter
    from rankwise.recipes import Comparison
    from rankwise.reports import ComparedModels, ComparedRow
    from rankwise.runs import Crew
    from rankwise.stages import Protocol, RowHand


def compare(
    comparison: Comparison,
    *,
    run_directory: Path | str | None = None,
    overwrite: bool = False,
    executor: str = "here",
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> ComparedModels:
    """Make and score every row, and write `comparison.json`, `.csv`, `.md` and `.html` into `comparison.output`.

    A row that cannot be made says why, and the rest goes on.

    Args:
        comparison: what is compared.
        run_directory: where finished stages are kept; as for `compress`.
        overwrite: replace a comparison of another model too.
        executor: `here`; `ray` or `ray:ADDRESS` have workers make rows, each with finished stages of its own.
        workers: how many.
        reporter: told about progress.

    Raises:
        RankwiseError: for anything the user can mend that concerns all rows; rows that are finished stay.
    """
    from rankwise import stages
    from rankwise.checkpoints import check_model, reserved
    from rankwise.progress import Reporter
    from rankwise.reports import COMPARISON_FILE, ComparedRow
    from rankwise.runs import Job, default_run_directory, make_writable

    reporter = reporter or Reporter(show=False)
    folder = Path(comparison.output)
    cells = stages.cells_of(comparison)
    stored = default_run_directory(comparison.model) if run_directory is None else Path(run_directory)
    if not overwrite:
        check_model(folder / COMPARISON_FILE, comparison.model)
    make_writable(folder, "give another --output")
    with reserved(folder):
        rows = stages.Rows(folder / "rows.jsonl", reporter)
        protocol, dense = stages.measure_dense(comparison, cells[0].recipe, rows, reporter)
        taken = [rows.taken(protocol.key_of(cell)) for cell in cells]
        jobs = [
            Job("rankwise.stages.one_row:make_row", {"number": number}, label=str(cell))
            for number, (cell, row) in enumerate(zip(cells, taken, strict=True))
            if row is None
        ]
        found = [dense]
        with _crew(executor if jobs else "here", workers, protocol, dense, stored) as crew:
            results = crew.results(jobs)
            for number, (cell, row) in enumerate(zip(cells, taken, strict=True), 1):
                reporter.say(f"row {number} of {len(cells)}: {cell}")
                if row is None:
                    row = ComparedRow(**next(results).value)
                    rows.add(row)
                found.append(row)
                # As far as it is: what is there is worth reading while the rest runs.
                result = stages.write_comparison(protocol, found, folder)
    return result


def _crew(executor: str, workers: int | None, protocol: Protocol, dense: ComparedRow, stored: Path) -> Crew:
    """Who makes rows."""
    from rankwise.runs import Here, make_writable

    make_writable(stored, "give another --run-dir")
    if executor == "here":
        return Here(_hand(protocol, dense, stored, protocol.reporter), Path(tempfile.gettempdir()))
    from rankwise.runs.on_ray import Opening, RayCrew

    # Recipes stay here: the class of a method may lie in a file, which a worker reads itself.
    opening = Opening("rankwise.flows.compare:open_rows", {"protocol": protocol, "dense": dense})
    return RayCrew(executor.partition(":")[2], workers, opening, stored, protocol.reporter)


def open_rows(root: Path, number: int, reporter: Reporter, *, protocol: Protocol, dense: ComparedRow) -> RowHand:
    """What a worker that makes rows begins with: finished stages in a folder of its own."""
    return _hand(replace(protocol, reporter=reporter), dense, root / f"worker-{number}", reporter)


def _hand(protocol: Protocol, dense: ComparedRow, stored: Path, reporter: Reporter) -> RowHand:
    from rankwise import stages
    from rankwise.flows.compress import compress

    make = partial(compress, run_directory=stored, reporter=reporter)
    return stages.RowHand(protocol, stages.cells_of(protocol.asked), dense, make)
