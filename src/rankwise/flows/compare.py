"""Several ways to make one model smaller, at several sizes, scored under one protocol, the original first.

Every cell is a run of `compress` in one run directory, so that statistics and outlooks are made once for all that need
the same. Rows are kept as they come: the same command goes on after a stop, and with further ways or sizes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.progress import Reporter
    from rankwise.recipes import Comparison
    from rankwise.reports import ComparedModels


def compare(
    comparison: Comparison,
    *,
    run_directory: Path | str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ComparedModels:
    """Make and score every row, and write `comparison.json`, `.csv`, `.md` and `.html` into `comparison.output`.

    A row that cannot be made says why, and the rest goes on.

    Args:
        comparison: what is compared.
        run_directory: where finished stages are kept; as for `compress`.
        overwrite: replace a comparison of another model too.
        reporter: told about progress.

    Raises:
        RankwiseError: for anything the user can mend that concerns all rows; rows that are finished stay.
    """
    from rankwise import stages
    from rankwise.checkpoints import check_model, reserved
    from rankwise.flows.compress import compress
    from rankwise.progress import Reporter
    from rankwise.reports import COMPARISON_FILE
    from rankwise.runs import make_writable

    reporter = reporter or Reporter(show=False)
    folder = Path(comparison.output)
    cells = stages.cells_of(comparison)
    make = partial(compress, run_directory=run_directory, reporter=reporter)
    if not overwrite:
        check_model(folder / COMPARISON_FILE, comparison.model)
    make_writable(folder, "give another --output")
    with reserved(folder):
        rows = stages.Rows(folder / "rows.jsonl", reporter)
        protocol, dense = stages.measure_dense(comparison, cells[0].recipe, rows, reporter)
        found = [dense]
        for number, cell in enumerate(cells, 1):
            reporter.say(f"row {number} of {len(cells)}: {cell}")
            row = rows.taken(protocol.key_of(cell))
            if row is None:
                row = stages.measure_cell(protocol, cell, dense, make)
                rows.add(row)
            found.append(row)
            # As far as it is: what is there is worth reading while the rest runs.
            result = stages.write_comparison(protocol, found, folder)
    return result
