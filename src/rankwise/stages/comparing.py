"""What the lines of `compare` do: a protocol, cells, and rows that are kept as they come."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from rankwise.checkpoints import fingerprint, load_model
from rankwise.data import Sequences, existing, parse_source
from rankwise.device import computed_type, named_device
from rankwise.errors import NotFiniteError
from rankwise.evaluation import (
    TaskScore,
    count_operations,
    generate,
    measure_cost,
    paired_difference,
    perplexity,
    require_tasks,
    run_tasks,
)
from rankwise.models import find_sites, unfuse_experts
from rankwise.progress import Reporter
from rankwise.recipes import Comparison, Recipe, Way
from rankwise.reports import (
    ComparedModels,
    ComparedRow,
    Machine,
    Settings,
    TaskFigure,
    write_comparison_page,
)
from rankwise.runs import Lines, stage_key
from rankwise.stages.finish import machine_of
from rankwise.stages.work import read_sequences

_ROW_FORMAT = 2
"""Raised when what a row holds, or how it is scored, changes."""


@dataclass(frozen=True)
class Cell:
    """One row to make: a way, a size and a seed, and the recipe that they give."""

    way: Way
    size: float
    seed: int
    recipe: Recipe

    def __str__(self) -> str:
        return f"{self.way} at {self.size:g}" + (f", seed {self.seed}" if self.seed else "")


def cells_of(comparison: Comparison) -> list[Cell]:
    """Every cell, its recipe validated before the first one runs; two ways that mean the same give one.

    Raises:
        RecipeError: naming the row.
    """
    cells = [
        Cell(way, size, seed, comparison.recipe(way, size, seed))
        for size in comparison.sizes
        for way in comparison.ways
        for seed in comparison.seeds
    ]
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.recipe.model_dump_json(), cell)
    return list(first.values())


def mark_of(source: str | None) -> str | None:
    """What a text is, apart from its name: the hash of its file, or the Python whose documentation it is.

    Raises:
        DataError: when there is no such file.
    """
    if source is None:
        return None
    parsed = parse_source(source)
    if parsed.kind == "bundled":
        return sys.version
    if parsed.kind in ("hub", "named"):
        return None
    return _digest(existing(parsed.target))


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def planned(cell: Cell) -> bool:
    """Whether a cell's plan comes from a file."""
    return any(getattr(cell.recipe.allocation, key, None) for key in ("file", "plan"))


class Rows:
    """The file of finished rows. What is not as it was written is made again.

    Args:
        path: the file; need not be there.
        reporter: told about damage.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self._lines = Lines(path)
        if self._lines.fault:
            reporter.note(f"{path.name}: {self._lines.fault}; what follows is made again")

    def taken(self, key: str) -> ComparedRow | None:
        """The row of this key, if it is there."""
        record = next((each for each in reversed(self._lines.records) if each.get("key") == key), None)
        try:
            return None if record is None else ComparedRow(**record)
        except ValidationError:
            return None

    def add(self, row: ComparedRow) -> None:
        """Keep a row, unless it failed for a reason that may be gone the next time."""
        if row.final:
            self._lines.add(row.model_dump(mode="json"), sync=True)


@dataclass(frozen=True)
class Protocol:
    """What every row is scored by.

    Attributes:
        asked: the comparison.
        texts: by source, its sequences.
        tokenizer: of the original.
        fingerprint: hash of the original's weights.
        architecture: class name of the original.
        machine: where it runs.
        computed: the type that is computed in, and the kind of device.
        reporter: told about progress.
    """

    asked: Comparison
    texts: dict[str, Sequences]
    tokenizer: Any
    fingerprint: str
    architecture: str
    machine: Machine
    computed: tuple[str, str]
    reporter: Reporter

    @property
    def key(self) -> dict[str, Any]:
        """What scores depend on, apart from the model that is scored."""
        shared = self.asked.model_dump(
            mode="json", exclude={"output", "ways", "sizes", "seeds", "settings", "model", "spelling"}
        )
        texts = {source: [read.fingerprint, read.bos] for source, read in self.texts.items()}
        tasks = {"harness": version("lm_eval"), "text": mark_of(self.asked.task_text)} if self.asked.tasks else {}
        return {
            "protocol": shared,
            "model": self.fingerprint,
            "texts": texts,
            "tasks": tasks,
            "computed": self.computed,
            "format": _ROW_FORMAT,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def key_of(self, cell: Cell) -> str:
        """Hash of all that a row depends on, what the files are that its recipe names among it."""
        recipe = cell.recipe
        named = (recipe.calibration.source, recipe.validation.source, recipe.repair.data)
        plans = [getattr(recipe.allocation, key, None) for key in ("file", "plan")]
        files = [*(mark_of(source) for source in named), *(_digest(Path(plan)) for plan in plans if plan)]
        return stage_key({**self.key, "recipe": recipe.model_dump(mode="json", exclude={"output"}), "files": files})

    def score(self, model: Any, dense: ComparedRow | None) -> dict[str, Any]:
        """Perplexities, task figures and continuations of a model, as attributes of a row.

        Args:
            model: in the precision it computes in.
            dense: row of the original, for differences; None for the original itself.
        """
        asked = self.asked
        scores: list[TaskScore] = []
        if asked.tasks:
            text = None if asked.task_text is None else parse_source(asked.task_text)
            scores = run_tasks(
                model, self.tokenizer, asked.tasks, limit=asked.limit, text=text, reporter=self.reporter
            ).scores
        return {
            "perplexity": {settings.source: self._perplexity(model, settings) for settings in asked.texts},
            "tasks": tuple(_figure(score, dense) for score in scores),
            "by_example": {f"{score.task}, {score.metric}": score.by_example for score in scores},
            "generations": {
                prompt: generate(model, self.tokenizer, prompt, new_tokens=asked.new_tokens) for prompt in asked.prompts
            },
        }

    def _perplexity(self, model: Any, settings: Any) -> float | None:
        read = self.texts[settings.source]
        try:
            return perplexity(
                model,
                read.ids,
                stride=settings.stride,
                batch_size=settings.batch_size,
                reporter=self.reporter,
                description=f"perplexity, {settings.source}",
                bos=read.bos,
            ).perplexity
        except NotFiniteError as problem:
            self.reporter.note(f"{settings.source}: {problem.problem}", passing=True)
            return None


def _figure(score: TaskScore, dense: ComparedRow | None) -> TaskFigure:
    apart = None
    if dense is not None:
        place = score.task, score.metric
        before = next(figure for figure in dense.tasks if (figure.task, figure.metric) == place)
        examples = dense.by_example.get(f"{score.task}, {score.metric}", ())
        first = TaskScore(*place, before.score, before.error, score.examples, before.truncated, examples)
        apart = paired_difference(first, score)
    return TaskFigure(
        task=score.task,
        metric=score.metric,
        score=score.score,
        error=score.error,
        difference=None if apart is None else apart.difference,
        difference_error=None if apart is None else apart.error,
        truncated=score.truncated,
    )


def measure_dense(
    comparison: Comparison, recipe: Recipe, rows: Rows, reporter: Reporter
) -> tuple[Protocol, ComparedRow]:
    """Load the original, read the texts with its tokenizer, and score it unless its row is there.

    Args:
        comparison: what is compared.
        recipe: any of its recipes: how a model is loaded is the same in all.
        rows: finished rows; the original's is added.
        reporter: told about progress.
    """
    if comparison.tasks:
        require_tasks(comparison.tasks)
    with reporter.stage("load"):
        loaded = load_model(
            recipe.model,
            precision=recipe.precision,
            device=named_device(recipe.device),
            trust_remote_code=recipe.trust_remote_code,
        )
        # What is wrong with the text that all rows are calibrated on is of no row alone.
        read_sequences(recipe.calibration, loaded, recipe.seed, skip=0)
        texts = {each.source: read_sequences(each, loaded, each.seed, each.skip) for each in comparison.texts}
        protocol = Protocol(
            asked=comparison,
            texts=texts,
            tokenizer=loaded.tokenizer,
            fingerprint=fingerprint(loaded.model, loaded.stored_dtypes),
            architecture=type(loaded.model).__name__,
            machine=machine_of(loaded.model.device),
            computed=(str(computed_type(loaded.model)), loaded.model.device.type),
            reporter=reporter,
        )
    key = stage_key({**protocol.key, "recipe": "dense"})
    row = rows.taken(key)
    if row is not None:
        return protocol, row
    with reporter.stage("dense"):
        scored = protocol.score(loaded.model, None)
    parts = unfuse_experts(loaded.model).parts
    dtypes = loaded.stored_dtypes | {part: loaded.stored_dtypes[whole] for part, whole in parts.items()}
    sites = find_sites(loaded.model)
    cost = measure_cost(loaded.model, sites, dtypes)
    stored = max((dtypes[f"{site.name}.weight"] for site in sites), key=lambda dtype: dtype.itemsize)
    row = ComparedRow(
        key=key,
        way="dense",
        keep=1.0,
        bits=8.0 * stored.itemsize,
        bytes=cost.bytes,
        parameters=cost.parameters,
        linear_parameters=cost.linear_parameters,
        macs=count_operations(loaded.model, stored).macs,
        **scored,
    )
    rows.add(row)
    return protocol, row


def write_comparison(protocol: Protocol, rows: list[ComparedRow], folder: Path) -> ComparedModels:
    """Write the rows that there are, as data, tables and a page."""
    found = ComparedModels(
        recipe=Settings(**protocol.asked.model_dump(mode="json")),
        model_fingerprint=protocol.fingerprint,
        architecture=protocol.architecture,
        rows=tuple(rows),
        machine=protocol.machine,
    )
    found.write(folder)
    write_comparison_page(folder, found)
    return found
