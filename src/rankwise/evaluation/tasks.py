"""Accuracy on tasks, by lm-evaluation-harness as a library: its tasks, its prompts, its scores.

The model in memory is handed to it, so that a compressed model is scored as it is. What the harness returns is kept
whole; `TaskScore` is the part that a comparison needs: one figure an example, so that the difference of two models has
the error of the paired difference, which is far smaller than that of either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rankwise.data import Source
from rankwise.errors import DataError, MissingPackageError, RankwiseError, RecipeError, nearest
from rankwise.evaluation.local_tasks import LOCAL_TASKS, make_examples
from rankwise.evaluation.not_finite import not_finite
from rankwise.progress import Reporter
from rankwise.reading import one_line, shown

_BOOTSTRAPS = 1000
"""Draws behind the standard error of a metric that has no formula for it; accuracies have one."""

_SAME = 1e-9
"""By which a mean over examples may miss the harness's own."""

_LOUD = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "transformers")
"""Loggers that are kept quiet."""


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        task: its name in the harness.
        metric: `acc`, `acc_norm`, ...
        score: mean over the examples, or what the harness makes of them.
        error: standard error, as the harness estimates it; None where it does not.
        examples: how many were scored.
        truncated: requests that were longer than the model's context and lost their beginning.
        by_example: the figure of each example, in order; empty where the harness has none.
    """

    task: str
    metric: str
    score: float
    error: float | None
    examples: int
    truncated: int
    by_example: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskResults:
    """What a run of tasks gave.

    Attributes:
        scores: by task and metric, in the order asked for.
        harness: the harness's own results: scores, configurations, versions and samples.
        truncated: by task or group asked for, requests that lost their beginning.
    """

    scores: list[TaskScore]
    harness: dict[str, Any]
    truncated: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How two models' figures on the same examples differ.

    Attributes:
        difference: second less first.
        error: standard error of the mean of the differences by example; None where there are none to compare.
    """

    difference: float
    error: float | None


def paired_difference(first: TaskScore, second: TaskScore) -> Difference:
    """The difference of two models on one task, with the error of the paired difference.

    With d_i the difference at example i of E, the error is s / sqrt(E), s the standard deviation of the d_i (E - 1).

    Args:
        first: of one model, such as the dense one.
        second: of another, on the same task and metric.
    """
    difference = second.score - first.score
    if len(first.by_example) < 2 or len(first.by_example) != len(second.by_example):
        return Difference(difference, None)
    if not all(abs(sum(each.by_example) / len(each.by_example) - each.score) < _SAME for each in (first, second)):
        # The figure is no mean over examples, as a perplexity is none.
        return Difference(difference, None)
    apart = [b - a for a, b in zip(first.by_example, second.by_example, strict=True)]
    mean = sum(apart) / len(apart)
    variance = sum((each - mean) ** 2 for each in apart) / (len(apart) - 1)
    return Difference(difference, math.sqrt(variance / len(apart)))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Sequence[Path] = (),
    text: Source | None = None,
    batch_size: int = 8,
    shots: int | None = None,
    reporter: Reporter | None = None,
) -> TaskResults:
    """Score a model on tasks.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer.
        tasks: names of the harness's tasks and groups, of those in `include`, or of `LOCAL_TASKS`.
        limit: examples of each at most.
        include: folders with task files of one's own.
        text: what `LOCAL_TASKS` are made from; the bundled text by default.
        batch_size: requests a batch.
        shots: examples that a prompt shows; as the task says by default.
        reporter: shows progress.

    Raises:
        MissingPackageError: when the harness is not installed.
        RecipeError: for an unknown task, with the nearest name.
        DataError: when a task's data cannot be had, or there is no tokenizer.
        NotFiniteError: when logits are not finite, with layer and token.
    """
    simple_evaluate = _harness().simple_evaluate
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so it cannot take tasks.", remedy="add the tokenizer files")
    source = text or Source("bundled", "heldout")
    local = {task: make_examples(task, source.documents(), str(source)) for task in tasks if task in LOCAL_TASKS}
    current = [""]
    with _quiet(reporter or Reporter(show=False), lambda: current[0]):
        scorer = _scorer(model, tokenizer, batch_size, current)
        manager = _manager(tasks, include)
        named = [_local_task(task, local[task]) if task in local else task for task in tasks]
        results: dict[str, Any] = {}
        for name, task in zip(tasks, named, strict=True):
            scorer.begin(name)
            try:
                # Every task by itself, so that one without data is named.
                found = simple_evaluate(
                    scorer,
                    tasks=[task],
                    limit=limit,
                    num_fewshot=shots,
                    task_manager=manager,
                    bootstrap_iters=_BOOTSTRAPS,
                )
            except RankwiseError:
                raise
            except Exception as problem:
                raise DataError(
                    f"The task {name} cannot be run ({type(problem).__name__}: {one_line(problem)[:200]}).",
                    where="tasks",
                    remedy="without a network use files of your own (--include-path), or " + ", ".join(LOCAL_TASKS),
                ) from None
            results[name] = found
    scores = [score for name, found in results.items() for score in _scores(found, scorer.truncated[name])]
    return TaskResults(scores, results, dict(scorer.truncated))


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise MissingPackageError("Tasks need lm-evaluation-harness.", remedy="pip install 'rankwise[tasks]'") from None
    return lm_eval


def require_tasks(tasks: Sequence[str], include: Sequence[Path] = ()) -> None:
    """Find out that a task is not known; arguments and errors as for `run_tasks`."""
    _harness()
    _manager(tasks, include)


def _manager(tasks: Sequence[str], include: Sequence[Path]) -> Any:
    """The harness's list of tasks, which has all those asked for; else the error says what is near."""
    for folder in include:
        if not folder.is_dir():
            raise RecipeError("There is no such folder of tasks.", where=str(folder), remedy="check --include-path")
    # Reading the harness's own list takes ten seconds.
    manager = _list_of(tuple(str(folder) for folder in include), not set(tasks) <= set(LOCAL_TASKS))
    known = {*LOCAL_TASKS, *manager.all_tasks}
    for task in tasks:
        if task not in known:
            raise RecipeError(
                f"There is no task {shown(task)}.",
                where="tasks",
                remedy=f"{_nearest_task(task, known)}; files of your own: --include-path",
            )
    return manager


@cache
def _list_of(include: tuple[str, ...], own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include) or None, include_defaults=own)


def _nearest_task(word: str, known: Iterable[str]) -> str:
    """A `did you mean` clause; where nothing is near, the tasks without a network, as there are thousands others."""
    clauses = (nearest(word[:80], (*LOCAL_TASKS, "local")), nearest(word[:80], known))
    clause = next((each for each in clauses if each.startswith("did")), "")
    return clause or "known without a network: " + ", ".join(LOCAL_TASKS)


def _local_task(task: str, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A task of the harness over examples in memory."""
    from datasets import Dataset

    def given(**_options: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list([dict(example) for example in examples])}

    metrics = ("acc", "acc_norm")
    return {
        "task": task,
        "custom_dataset": given,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }


def _scorer(model: Any, tokenizer: Any, batch_size: int, current: list[str]) -> Any:
    """The harness's own wrapper of a model, which also counts what is cut off and stops at what is not finite."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        truncated: dict[str, int]

        def begin(self, task: str) -> None:
            current[0] = task
            self.truncated[task] = 0

        def _loglikelihood_tokens(self, requests: Any, *positional: Any, **named: Any) -> Any:
            longest = max((len(target) for _, _, target in requests), default=0)
            if longest > self.max_length:
                raise DataError(
                    f"A choice has {longest} tokens, more than the model's context of {self.max_length}.",
                    where=f"task {current[0]}",
                    remedy="take another task; a beginning can be cut off, a choice cannot",
                )
            self.truncated[current[0]] += sum(len(c) + len(t) > self.max_length + 1 for _, c, t in requests)
            return super()._loglikelihood_tokens(requests, *positional, **named)

        def _model_call(self, inps: Any, *positional: Any, **named: Any) -> Any:
            logits = super()._model_call(inps, *positional, **named)
            if not logits.isfinite().all():
                raise not_finite(self.model, inps, "logits", f"task {current[0]}")
            return logits

    Scorer.truncated = {}
    return Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _scores(found: Mapping[str, Any], truncated: int) -> Iterator[TaskScore]:
    """The figures in the results of one task or group."""
    for task, figures in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        for key, score in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            each = [row.get(metric) for row in samples if row.get("filter", kind) == kind]
            yield TaskScore(
                task,
                metric,
                float(score),
                float(error) if isinstance(error, int | float) else None,
                len(each) or int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
                truncated,
                tuple(float(value) for value in each) if all(isinstance(v, int | float) for v in each) else (),
            )


class _Bar:
    """What the harness takes for a progress bar: it counts requests, and what shows them is ours."""

    def __init__(self, items: Any, reporter: Reporter, text: str, total: int | None) -> None:
        self._items, self._open = items, ExitStack()
        self._advance = self._open.enter_context(reporter.counting(text, total)) if total else None
        self._text = text

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def update(self, count: int = 1) -> None:
        for _ in range(count if self._advance else 0):
            self._advance(self._text)  # type: ignore[misc]

    def close(self) -> None:
        self._open.close()


@contextmanager
def _quiet(reporter: Reporter, task: Callable[[], str]) -> Iterator[None]:
    """The harness tells much of what it does, on standard error; what matters here is told otherwise."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    def bar(items: Any = None, *_: Any, total: int | None = None, **__: Any) -> _Bar:
        return _Bar(items, reporter, f"task {task()}", total)

    modules = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    real = [module.tqdm for module in modules]
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for module in modules:
        module.tqdm = bar
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, before in zip(modules, real, strict=True):
            module.tqdm = before
