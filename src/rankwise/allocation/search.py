"""The search: starts that are known to be good, a few spread points, then what the surrogate proposes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.allocation.base import Outcome
from rankwise.allocation.box import Box
from rankwise.allocation.surrogate import generator
from rankwise.allocation.trials import TrialLog, finite
from rankwise.errors import BudgetError
from rankwise.progress import Reporter

_MOST_SPREAD = 12


@dataclass(frozen=True)
class Seen:
    """What a proposal is made from.

    Attributes:
        points: of finished trials, shape `[t, d]`.
        values: objective there, shape `[t]`; failed trials have the worst value seen.
        pending: points of trials that are not finished, shape `[p, d]`.
    """

    points: Tensor
    values: Tensor
    pending: Tensor


Judge = Callable[[Iterable[Mapping[str, Any]]], Iterator[Outcome]]
"""What points stand for, one after another -> their outcomes in the same order."""

Proposer = Callable[[Seen, int, Callable[[Tensor], bool]], Tensor]
"""(what was seen, trial, is_new) -> point `[d]`."""


def spread_trials(dimensions: int, warm: bool) -> int:
    """How many trials come before the first proposal, the given starts among them.

    The total number of trials does not matter, so that it may be raised later.

    Args:
        dimensions: of the space.
        warm: whether a plan was given to start from, which leaves less to explore.
    """
    return min(dimensions + 2, _MOST_SPREAD) // (2 if warm else 1)


def search(
    space: Box,
    starts: Sequence[tuple[str, Tensor]],
    judge: Judge,
    propose: Proposer,
    log: TrialLog,
    trials: int,
    seed: int,
    reporter: Reporter,
    ahead: int = 1,
) -> dict[str, Any]:
    """Run trials until there are `trials` in the log.

    A trial whose objective is not finite is recorded as failed; the surrogate sees it as the worst value so far. With
    several at a time, trial t is proposed from those up to t - ahead, and from where the others are: so the search does
    not depend on which of them ends first, and goes on after a stop as it would have.

    Args:
        space: where points lie, and what they stand for.
        starts: the first points, with names.
        judge: plans -> outcomes.
        propose: the surrogate.
        log: finished trials; continued.
        trials: how many in all.
        seed: for spread points.
        reporter: shows the trial's number, the best so far and this one's objective.
        ahead: trials at a time.

    Returns:
        The best trial's record.

    Raises:
        BudgetError: when every trial failed.
    """
    spread = spread_trials(space.dimensions, warm=any(name == "plan" for name, _ in starts))
    seen = {_identity(space.decided(torch.tensor(r["point"], dtype=torch.float64))) for r in log.records[:trials]}
    begun: deque[tuple[str, Tensor, float, float]] = deque()

    def is_new(point: Tensor) -> bool:
        return _identity(space.decided(point)) not in seen

    def plans() -> Iterator[Mapping[str, Any]]:
        for trial in range(done, trials):
            began = time.perf_counter()
            if trial < len(starts):
                origin, point = starts[trial]
            elif trial < max(spread, ahead):
                drawn = space.draw(16, generator(seed, trial))
                origin, point = "spread", next((p for p in drawn if is_new(p)), drawn[0])
            else:
                finished = trial - ahead + 1
                pending = [torch.tensor(r["point"], dtype=torch.float64) for r in log.records[finished:trial]]
                pending += [each[1] for each in begun]
                evidence = _evidence(log.records[:finished], pending, space.dimensions)
                origin, point = "proposed", propose(evidence, trial, is_new)
            decided = space.decided(point)
            seen.add(_identity(decided))
            now = time.perf_counter()
            begun.append((origin, point, now - began, now))
            yield decided

    done = min(len(log.records), trials)
    with reporter.counting("search", total=trials, done=done) as advance:
        for trial, outcome in zip(range(done, trials), judge(plans()), strict=False):
            origin, point, thought, since = begun.popleft()
            whole = finite(outcome.value) is not None
            log.append(
                {
                    "trial": trial,
                    "origin": origin,
                    "point": point.tolist(),
                    "objective": finite(outcome.value),
                    "perplexity": finite(outcome.perplexity),
                    "kl": finite(outcome.kl),
                    "failed": not whole,
                    "optimiser_seconds": round(thought, 4),
                    "trial_seconds": round(time.perf_counter() - since, 4),
                }
            )
            finished = [r["objective"] for r in log.records if not r["failed"]]
            last = f"{outcome.value:.4g}" if whole else "failed"
            advance(f"search: best {min(finished):.4g}, last {last}" if finished else "search: all failed so far")
    counted = log.records[:trials]
    failed = sum(record["failed"] for record in counted)
    if failed:
        reporter.note(f"{failed} of {trials} trials had an objective that is not finite")
    good = [record for record in counted if not record["failed"]]
    if not good:
        raise BudgetError(
            "Every trial's objective was NaN or infinite.",
            where="search",
            remedy="raise --keep; if that does not help, look at the model's activations",
        )
    return min(good, key=lambda record: record["objective"])


def _identity(decided: Mapping[str, Hashable]) -> tuple[Hashable, ...]:
    return tuple(decided.values())


def _evidence(records: Sequence[Mapping[str, Any]], pending: Sequence[Tensor], dimensions: int) -> Seen:
    points = torch.tensor([record["point"] for record in records], dtype=torch.float64)
    finished = [record["objective"] for record in records if not record["failed"]]
    worst = max(finished, default=1.0)
    values = [worst if record["failed"] else record["objective"] for record in records]
    waiting = torch.stack(list(pending)) if pending else points.new_empty(0, dimensions)
    return Seen(points, torch.tensor(values, dtype=torch.float64), waiting)
