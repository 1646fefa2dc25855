"""One model's scores on several texts and tasks, and two models' scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.errors import ModelError
from rankwise.evaluation.perplexity import Perplexity
from rankwise.evaluation.tasks import TaskResults, paired_difference

_SAMPLE = "The quick brown fox, 1234 times; naïve façade \N{SNOWMAN} don't.\n\n  def f(x): return x"


@dataclass(frozen=True)
class Scored:
    """What a model was found to be worth.

    Attributes:
        model: directory or hub name.
        perplexity: by text, in the order asked for.
        tasks: what tasks gave; None when none were asked for.
        available: by text, sequences that it holds.
    """

    model: str
    perplexity: dict[str, Perplexity]
    tasks: TaskResults | None
    available: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """As plain values, without single examples."""
        scores = [] if self.tasks is None else self.tasks.scores
        tasks = [{k: v for k, v in asdict(score).items() if k != "by_example"} for score in scores]
        return {
            "model": self.model,
            "perplexity": {text: asdict(found) for text, found in self.perplexity.items()},
            "tasks": tasks,
        }


def require_same_tokenizer(first: Any, second: Any, names: tuple[str, str]) -> None:
    """Raise when two models cut text into other tokens: their perplexities cannot be compared.

    Args:
        first: a tokenizer, or None.
        second: another.
        names: of their models.

    Raises:
        ModelError: naming both models.
    """
    same = first is None and second is None
    if first is not None and second is not None:
        same = first.get_vocab() == second.get_vocab() and first(_SAMPLE)["input_ids"] == second(_SAMPLE)["input_ids"]
    if not same:
        raise ModelError(
            "The two models have different tokenizers, so their scores cannot be compared.",
            where=" and ".join(names),
            remedy="compare a model with one that was made from it",
        )


def differences(one: Scored, other: Scored) -> list[dict[str, Any]]:
    """Task by task, what `one` has less `other`, with the error of the paired difference."""
    mine: Sequence[Any] = [] if one.tasks is None else one.tasks.scores
    theirs = {} if other.tasks is None else {(s.task, s.metric): s for s in other.tasks.scores}
    rows = []
    for score in mine:
        if (score.task, score.metric) in theirs:
            apart = paired_difference(theirs[score.task, score.metric], score)
            rows.append({"task": score.task, "metric": score.metric, **asdict(apart)})
    return rows
