"""What values of a recipe may be: bounded numbers, paths that a file system can hold, sources in the grammar."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rankwise.data import parse_source
from rankwise.errors import RankwiseError, nearest
from rankwise.reading import check_path

_MOST = 1 << 40


class Node(BaseModel):
    """A mapping of a recipe: no keys but its own, finite numbers, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# NumPy, which training seeds too, takes 32 bits.
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""For everything drawn."""

Count = Annotated[int, Field(ge=1, le=_MOST)]
"""How many of something."""

Skipped = Annotated[int, Field(ge=0, le=_MOST)]
"""How many are left out."""

Length = Annotated[int, Field(ge=2, le=_MOST)]
"""Tokens a sequence."""

Pattern = Annotated[str, Field(min_length=1, max_length=500)]
"""A glob pattern over names of sites."""


def _checked_head(text: str) -> str:
    form, colon, kept = text.partition(":")
    if form not in HEADS or (colon and form != LOW_RANK):
        raise ValueError(f"there is no such head; {nearest(text[:80], HEADS)}")
    if colon:
        try:
            fraction = float(kept)
        except ValueError:
            fraction = 0.0
        if not 0 < fraction < 1:
            raise ValueError("behind low-rank: stands a fraction above 0 and below 1, as in low-rank:0.6")
    return text


LOW_RANK = "low-rank"

HEADS = ("8bit", LOW_RANK)
"""What a head may be stored as."""

HeadText = Annotated[str, AfterValidator(_checked_head)]
"""`8bit`, `low-rank`, or `low-rank:FRACTION`."""

_BESIDE = len("..training.partial")


def _checked_source(text: str) -> str:
    try:
        parse_source(text)
    except RankwiseError as problem:
        raise ValueError(f"{problem.problem} {problem.remedy or ''}".strip()) from None
    return text


SourceText = Annotated[str, AfterValidator(_checked_source)]
"""A text source, in the grammar of `rankwise.data.sources`."""

ModelName = Annotated[str, AfterValidator(check_path)]
"""A directory or a hub name."""

# What is being written has a longer name for a while.
FilePath = Annotated[str, AfterValidator(lambda text: check_path(text, beside=_BESIDE))]
"""A path to be written."""
