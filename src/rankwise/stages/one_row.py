"""Rows of a comparison, made one by one, in this process or by workers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import BudgetError, DataError, MissingPackageError, NotFiniteError, RankwiseError, RunError
from rankwise.evaluation import count_operations
from rankwise.layers import keep_decoded
from rankwise.recipes import Recipe
from rankwise.reports import ComparedRow
from rankwise.stages.comparing import Cell, Protocol, planned


@dataclass(frozen=True)
class RowHand:
    """What rows are made with.

    Attributes:
        protocol: what they are scored by.
        cells: all of them.
        dense: row of the original.
        make: gives `model`, `plan` and `report`, as `compress` does.
    """

    protocol: Protocol
    cells: list[Cell]
    dense: ComparedRow
    make: Callable[[Recipe], Any]


def make_row(hand: RowHand, _out: Path, *, number: int) -> dict[str, Any]:
    """One row, as plain values."""
    row = measure_cell(hand.protocol, hand.cells[number], hand.dense, hand.make)
    return row.model_dump(mode="json")


def measure_cell(protocol: Protocol, cell: Cell, dense: ComparedRow, make: Callable[[Recipe], Any]) -> ComparedRow:
    """Make a cell's model and score it; where there is none, the row says why.

    Args:
        protocol: what it is scored by.
        cell: which.
        dense: row of the original.
        make: gives `model`, `plan` and `report`, as `compress` does.

    Raises:
        MissingPackageError: an optional package is needed, which is of no row alone.
        RunError: when the run directory is not usable.
    """
    facts: dict[str, Any] = {
        "key": protocol.key_of(cell),
        "way": str(cell.way),
        "seed": cell.seed,
        "asked": cell.size,
    }
    reporter = protocol.reporter
    before, started = len(reporter.notes), time.monotonic()
    try:
        made = make(cell.recipe)
    except (MissingPackageError, RunError):
        raise
    except RankwiseError as problem:
        # A plan that cannot be read, say, may be there the next time; what no plan fits stays so.
        lasting = isinstance(problem, NotFiniteError) or (isinstance(problem, BudgetError) and not planned(cell))
        return ComparedRow(**facts, problem=" ".join(str(problem).split()), final=lasting)
    seconds = round(time.monotonic() - started, 1)
    model, report = made.model, made.report
    operations = count_operations(model, torch.bfloat16)
    if cell.recipe.precision == "float32" or (cell.recipe.precision == "auto" and model.device.type == "cpu"):
        model.float()
    keep_decoded(model)
    try:
        with reporter.stage("score"):
            scored = protocol.score(model, dense)
    except (NotFiniteError, DataError) as problem:
        # The original was scored: what cannot be scored here is this model.
        lasting = isinstance(problem, NotFiniteError)
        return ComparedRow(**facts, problem=" ".join(str(problem).split()), final=lasting)
    finally:
        del model
    gc.collect()
    return ComparedRow(
        **facts,
        keep=made.plan.kept,
        bits=made.plan.bits_a_weight,
        bytes=report.after.bytes,
        parameters=report.after.parameters,
        linear_parameters=report.after.linear_parameters,
        macs=operations.macs,
        seconds=seconds,
        notes=tuple(reporter.notes[before:]),
        **scored,
    )
