"""Every error a user can meet. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class RankwiseError(Exception):
    """A problem the user can act on.

    Args:
        problem: what is wrong, one sentence.
        where: the file, layer or key.
        remedy: what to do.
    """

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.remedy = remedy
        lines = [problem]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  do:    {remedy}")
        super().__init__("\n".join(lines))


class RecipeError(RankwiseError):
    """A recipe, or an option given on the command line, is not valid."""


class ModelError(RankwiseError):
    """A model directory cannot be read, or is not a causal language model."""


class DataError(RankwiseError):
    """A text source cannot be read or holds too little."""


class BudgetError(RankwiseError):
    """No plan meets the budget."""


class NotFiniteError(RankwiseError):
    """A weight, an activation or a factor holds NaN or an infinity."""


class IllConditionedError(RankwiseError):
    """Factors cannot be stored in the form asked for; another form can hold them.

    Attributes:
        largest: the entry that is too large.
    """

    def __init__(self, problem: str, largest: float) -> None:
        super().__init__(problem)
        self.largest = largest


class OutputError(RankwiseError):
    """The output directory is not usable."""


class RunError(RankwiseError):
    """The directory of finished stages is not usable."""


class MissingPackageError(RankwiseError):
    """An optional package is needed and not installed."""


def is_disk_full(problem: BaseException) -> bool:
    """Whether an error means that the disk is full: from Python, or from the library that writes weights."""
    text = str(problem)
    return getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in text for words in ("No space left", "StorageFull", "quota exceeded")
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """A `did you mean` clause for a misspelt word, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
