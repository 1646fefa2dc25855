"""`ComparedModels`: what a comparison found, as a frozen object, one JSON file, one CSV file and tables in Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from rankwise.errors import ModelError
from rankwise.reading import UnreadableError, first_problem, parse_json, read_bytes
from rankwise.reports.escaping import in_markdown
from rankwise.reports.parts import Machine, Part, Settings
from rankwise.sizes import bytes_in_words

COMPARISON_FORMAT: Final = "rankwise-comparison/1"
COMPARISON_FILE = "comparison.json"

PUBLISHED = {
    "svd": "SVD",
    "fwsvd": "FWSVD",
    "asvd": "ASVD; as published its ranks are searched, here the allocation says",
    "svd_llm": "SVD-LLM (W), without its update of parameters",
    "afm": "AFM, the features' covariance alone",
    "afm/manual": "LoRD, with its published proportions",
    "bolaco/manual": "LoRD's published proportions, with Bolaco's pooled covariance",
    "bolaco/bayesian:5x1": "Bolaco 5x1 (Tables 1, 6 and 7; with subspace repair: PT)",
    "bolaco/bayesian:5x4": "Bolaco 5x4 (Tables 1, 6 and 7; with subspace repair: PT)",
    "caldera": "CALDERA; as published one rank and one Q everywhere, here the budget is spread",
    "quantize": "QuIP#'s codes without fine-tuning; as published one width everywhere",
}
"""By way, or by its method: the published figures that a row may be put beside, on the paper's models and texts."""


class TaskFigure(Part):
    """One figure of one task.

    Attributes:
        task: its name.
        metric: `acc`, `acc_norm`, ...
        score: of the model.
        error: its standard error.
        difference: to the original; None for the original itself.
        difference_error: of the paired difference.
        truncated: requests that lost their beginning.
    """

    task: str
    metric: str
    score: float
    error: float | None = None
    difference: float | None = None
    difference_error: float | None = None
    truncated: int = 0


class ComparedRow(Part):
    """One model of a comparison.

    Attributes:
        key: hash of all that the row depends on.
        way: how it was made, `dense` for the original.
        seed: of its recipe.
        asked: size asked for; None for the original.
        keep: fraction of the linear weights' bits that is left.
        bits: bits a linear weight.
        bytes: of all parameters as they are stored.
        parameters: of the whole model.
        linear_parameters: of the decoder's linear layers.
        macs: multiply-accumulate operations of a pass of 64 tokens.
        perplexity: by text; None where it is not finite.
        tasks: accuracies.
        by_example: by task and metric, the figure of each example.
        generations: by prompt.
        seconds: that making it took, without scoring; stages that were there are not made again.
        problem: why there is no such model, or what went wrong; None for a row that is whole.
        notes: what was said while it was made.
        final: False for a problem that may be gone the next time.
    """

    key: str
    way: str
    seed: int = 0
    asked: float | None = None
    keep: float | None = None
    bits: float | None = None
    bytes: int | None = None
    parameters: int | None = None
    linear_parameters: int | None = None
    macs: int | None = None
    perplexity: dict[str, float | None] = Field(default_factory=dict)
    tasks: tuple[TaskFigure, ...] = ()
    by_example: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    generations: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None
    notes: tuple[str, ...] = ()
    final: bool = True

    @property
    def published(self) -> str:
        """Published figures that it may be put beside, in words; empty for none."""
        plain = self.way.split("+")[0]
        for name in (plain, plain.split(":")[0], plain.split("/")[0]):
            if name in PUBLISHED:
                return PUBLISHED[name]
        return ""


class ComparedModels(Part):
    """A whole comparison.

    Attributes:
        format: version of the file's form.
        recipe: what was compared, and the protocol.
        model_fingerprint: hash of the original's weights.
        architecture: class name of the original.
        rows: the original first, then in the order asked for.
        machine: where it ran.
    """

    format: Literal["rankwise-comparison/1"] = COMPARISON_FORMAT
    recipe: Settings
    model_fingerprint: str
    architecture: str
    rows: tuple[ComparedRow, ...]
    machine: Machine

    @property
    def dense(self) -> ComparedRow:
        """The row of the original."""
        return self.rows[0]

    @property
    def sizes(self) -> list[float]:
        """Sizes asked for, in their order."""
        return list(dict.fromkeys(row.asked for row in self.rows if row.asked is not None))

    @property
    def ways(self) -> list[str]:
        """Ways, in their order, the original left out."""
        return list(dict.fromkeys(row.way for row in self.rows if row.asked is not None))

    @property
    def texts(self) -> list[str]:
        """Texts that perplexity was measured on."""
        return list(self.dense.perplexity)

    @property
    def task_figures(self) -> list[tuple[str, str]]:
        """Tasks and metrics."""
        return [(figure.task, figure.metric) for figure in self.dense.tasks]

    def spelled(self, size: float) -> str:
        """A size as it was asked for."""
        spelling = getattr(self.recipe, "spelling", "keep")
        return bytes_in_words(size) if spelling == "size" else f"{size:g}" + (" bits" if spelling == "bits" else "")

    def named(self, row: ComparedRow) -> str:
        """A row in words: its way, its size, and its seed where it is another than 0."""
        size = "" if row.asked is None else f" at {self.spelled(row.asked)}"
        return f"{row.way}{size}" + (f", seed {row.seed}" if row.seed else "")

    def cell(self, way: str, size: float) -> list[ComparedRow]:
        """The rows of a way and a size, one a seed."""
        return [row for row in self.rows if row.way == way and row.asked == size]

    @classmethod
    def load(cls, path: Path) -> ComparedModels:
        """Read `comparison.json`.

        Raises:
            ModelError: when it cannot be read.
        """
        remedy = "make it again with rankwise compare"
        try:
            return cls.model_validate(parse_json(read_bytes(path), finite=False))
        except UnreadableError as problem:
            raise ModelError(f"The comparison cannot be read: {problem}.", where=str(path), remedy=remedy) from None
        except ValidationError as problem:
            _, place, message = first_problem(problem)
            raise ModelError(
                f"The comparison cannot be read: {message}.", where=f"{path}: {place}", remedy=remedy
            ) from None

    def write(self, folder: Path) -> None:
        """Write `comparison.json`, `comparison.csv` and `comparison.md`."""
        from rankwise.runs import write_atomically

        write_atomically(folder / COMPARISON_FILE, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")
        write_atomically(folder / "comparison.csv", self.as_csv())
        write_atomically(folder / "comparison.md", self.as_markdown())

    def as_csv(self) -> str:
        """One line a row, every figure a column."""
        plain = ("way", "seed", "asked", "keep", "bits", "bytes", "parameters", "linear_parameters", "macs", "seconds")
        figures = [f"{task} {metric}" for task, metric in self.task_figures]
        columns = [*plain, *(f"perplexity {text}" for text in self.texts)]
        for name in figures:
            columns += [name, f"{name} error", f"{name} difference", f"{name} difference error"]
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=[*columns, "published", "problem"], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            line: dict[str, Any] = {name: getattr(row, name) for name in plain}
            line |= {f"perplexity {text}": value for text, value in row.perplexity.items()}
            for each in row.tasks:
                name = f"{each.task} {each.metric}"
                line |= {name: each.score, f"{name} error": each.error}
                line |= {f"{name} difference": each.difference, f"{name} difference error": each.difference_error}
            writer.writerow({**line, "published": row.published, "problem": row.problem})
        return out.getvalue()

    def grid(self, figure: Callable[[ComparedRow], float | None], shown: str) -> list[list[str]]:
        """Ways by sizes: mean over seeds, with the standard deviation where there are several.

        Args:
            figure: of a row; None where there is none.
            shown: format of a number.
        """
        lines = []
        for way in self.ways:
            cells = []
            for size in self.sizes:
                rows = self.cell(way, size)
                values = [value for row in rows if (value := figure(row)) is not None]
                if not values:
                    cells.append("no plan" if rows and all(row.problem for row in rows) else "-")
                    continue
                spread = f" ± {stdev(values):{shown}}" if len(values) > 1 else ""
                cells.append(f"{mean(values):{shown}}{spread}")
            lines.append([way, *cells])
        return lines

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """All tables: title, header, lines, the original in the first line."""
        sizes = [self.spelled(size) for size in self.sizes]
        found = []

        def add(title: str, label: str, figure: Callable[[ComparedRow], float | None], shown: str) -> None:
            value = figure(self.dense)
            dense = ["dense", *(["-" if value is None else f"{value:{shown}}"] * len(sizes))]
            found.append((title, [label, *sizes], [dense, *self.grid(figure, shown)]))

        for text in self.texts:
            add(f"Perplexity on {text}", "way", lambda row, text=text: row.perplexity.get(text), ".2f")  # type: ignore[misc]
        found += [self._tasks_at(size) for size in self.sizes if self.task_figures]
        add("Bytes of all parameters, millions", "way", lambda r: None if r.bytes is None else r.bytes / 1e6, ".2f")
        add("Parameters, millions", "way", lambda r: None if r.parameters is None else r.parameters / 1e6, ".2f")
        add("MACs of 64 tokens, billions", "way", lambda r: None if r.macs is None else r.macs / 1e9, ".3f")
        return found

    @property
    def _asked(self) -> Collection[str]:
        """Tasks asked for: of a group, its own figure and not those of its parts."""
        return getattr(self.recipe, "tasks", None) or ()

    def _tasks_at(self, size: float) -> tuple[str, list[str], list[list[str]]]:
        """Ways by tasks at one size, as the papers' tables have them: score, and the difference to the original."""
        tasks = list(dict.fromkeys(t for t, _ in self.task_figures if not self._asked or t in self._asked))
        metrics = {task: next(m for t, m in self.task_figures if t == task) for task in tasks}
        lines = [
            [
                "dense",
                *(f"{_task(self.dense, (t, metrics[t])) or 0:.3f}" for t in tasks),
                _mean_of(self.dense, self._asked),
            ]
        ]
        for way in self.ways:
            rows = [row for row in self.cell(way, size) if not row.problem]
            if not rows:
                lines.append([way, *(["no plan"] * (len(tasks) + 1))])
                continue
            cells = []
            for task in tasks:
                figures = [f for row in rows for f in row.tasks if (f.task, f.metric) == (task, metrics[task])]
                score = mean(figure.score for figure in figures)
                apart = mean(figure.difference or 0.0 for figure in figures)
                errors = [f.difference_error for f in figures if f.difference_error is not None]
                cells.append(f"{score:.3f} ({apart:+.3f}" + (f" ± {mean(errors):.3f})" if errors else ")"))
            values = [value for row in rows if (value := mean_accuracy(row, self._asked)) is not None]
            lines.append([way, *cells, f"{mean(values):.3f}" if values else "-"])
        header = ["way", *(f"{task}, {metrics[task]}" for task in tasks), "mean accuracy"]
        return f"Tasks at {self.spelled(size)}; in brackets the difference to the original", header, lines

    def as_markdown(self) -> str:
        """Every table, then what could not be made and what rows may be put beside."""
        parts = [f"# {in_markdown(getattr(self.recipe, 'model', 'a model'))}, made smaller\n"]
        for title, header, lines in self.tables():
            parts.append(f"## {in_markdown(title)}\n\n" + _markdown(header, lines))
        problems = [f"- {in_markdown(self.named(r))}: {in_markdown(r.problem)}" for r in self.rows if r.problem]
        if problems:
            parts.append("## What could not be made\n\n" + "\n".join(problems) + "\n")
        published = {row.way: row.published for row in self.rows if row.published}
        if published:
            beside = [f"- {in_markdown(way)}: {in_markdown(text)}" for way, text in published.items()]
            parts.append("## Published figures that rows may be put beside\n\n" + "\n".join(beside) + "\n")
        if self.dense.generations:
            parts.append("## What is said\n")
            for prompt in self.dense.generations:
                said = [(self.named(row), row.generations[prompt]) for row in self.rows if prompt in row.generations]
                parts.append(_markdown([f"prompt: {prompt}", "continuation"], [list(pair) for pair in said]))
        return "\n".join(parts)


def mean_accuracy(row: ComparedRow, tasks: Collection[str] = ()) -> float | None:
    """Mean of the plain accuracies of a row's tasks; None without any.

    Args:
        row: of which model.
        tasks: those that count, such as those asked for and no parts of a group; empty for all.
    """
    scores = [figure.score for figure in row.tasks if figure.metric == "acc" and (not tasks or figure.task in tasks)]
    return mean(scores) if scores else None


def _mean_of(row: ComparedRow, tasks: Collection[str]) -> str:
    value = mean_accuracy(row, tasks)
    return "-" if value is None else f"{value:.3f}"


def _task(row: ComparedRow, key: tuple[str, str]) -> float | None:
    return next((figure.score for figure in row.tasks if (figure.task, figure.metric) == key), None)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(in_markdown(cell) for cell in line) + " |" for line in (header, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]]) + "\n"
