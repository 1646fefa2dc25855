"""The parts of a report, one frozen object each, named as the file names its keys."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_serializer,
    model_validator,
)

from rankwise.allocation import Outcome, finite
from rankwise.evaluation import Cost, Perplexity
from rankwise.models import Site
from rankwise.progress import StageTime
from rankwise.sizes import Cut, Plan


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; numbers that are not finite become their names, which are read as numbers again."""
    return json.loads(json.dumps(value), parse_constant=str)


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""How many of something."""

Measured = Annotated[float, Field(allow_inf_nan=True), AfterValidator(finite)] | None
"""A number that a damaged model may make infinite, or no number: it is None then, and null in the file."""


def _without_no_bos(score: Perplexity, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
    return {key: value for key, value in write(score).items() if key != "bos" or value is not None}


Score = Annotated[Perplexity, WrapSerializer(_without_no_bos)]
"""A perplexity; the file names the start token where there was one."""


def _without_defaults(stage: StageTime, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
    silent = {"taken_over": False, "anonymous_bytes": None, "gpu_bytes": None}
    return {key: value for key, value in write(stage).items() if key not in silent or value != silent[key]}


Timed = Annotated[StageTime, WrapSerializer(_without_defaults)]
"""Time and memory of a stage; the file has what 0.1.0 did not know only where it is told."""

Plain = Annotated[Any, AfterValidator(_plain)]
"""Anything that JSON can hold."""


def in_words(value: float | None, form: str) -> str:
    """A measured number in a format such as `.4g`."""
    return "not finite" if value is None else format(value, form)


class Part(BaseModel):
    """A part of a report: frozen, without keys that are not known, and without numbers that JSON cannot hold.

    A key that was not given and has nothing in it is left out of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_what_was_not_said(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value or key in self.model_fields_set}


class Settings(Part):
    """Settings as plain values. Known is what reports read of them; every other key is an attribute too, as it is.

    They are not checked, so that a report outlives changes of what can be set.
    """

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Plain]


class Named(Settings):
    """A method or an allocation, its settings among the other attributes.

    Attributes:
        name: which one.
    """

    name: str


class RecipeSettings(Settings):
    """The recipe of a compression: `recipe_from(report.recipe.model_dump())` is a recipe again.

    Attributes:
        model: directory or hub name of the checkpoint.
        method: how a weight was fitted.
        allocation: how size was spread over the sites.
        format: `low_rank`, or `dense` where the factors were multiplied back.
        max_shard_size: size at which weights are split over files, such as `5GB`.
    """

    model: str
    method: Named
    allocation: Named
    format: Literal["low_rank", "dense"]
    max_shard_size: str


class Kept(Part):
    """The fraction of the decoder's linear weights that is kept, counted in numbers of the checkpoint's own type.

    Attributes:
        asked: what was asked for; None when the size was spelled otherwise, or not at all.
        got: what came out.
    """

    asked: float | None
    got: float


class Bits(Part):
    """Bits a weight of the decoder's linear layers, on the average.

    Attributes:
        asked: what was asked for; None when the size was spelled otherwise, or not at all.
        got: what came out, with scales, signs and factors counted.
        before: of the original.
    """

    asked: float | None
    got: float
    before: float


def bits_of(plan: Plan, before: Cost) -> Bits | None:
    """Bits a weight under a plan, of a model of this size; None for a plan that keeps a fraction in numbers."""
    if not plan.coded and plan.keep is not None:
        return None
    return Bits(asked=plan.bits, got=plan.bits_a_weight, before=8 * before.linear_bytes / plan.weights)


class Scores(Part):
    """Perplexity before and after.

    Attributes:
        source: the text it was measured on.
        dense: of the original.
        compressed: of the result.
    """

    source: str
    dense: Score
    compressed: Score


class CalibrationText(Part):
    """What the statistics were taken on.

    Attributes:
        source: of the text.
        sequences: how many were used.
        length: tokens a sequence.
        available: sequences the source held.
        fingerprint: hash of the token ids.
        bos: the start token that each sequence begins with; None for none.
        gradient_sequences: at how many of them gradients were taken, where not at all and where any were.
    """

    source: str
    sequences: Count
    length: Count
    available: Count
    fingerprint: str
    bos: int | None = None
    gradient_sequences: Count | None = None


class ValidationText(Part):
    """The samples a search judged its plans on.

    Attributes:
        source: of the text.
        sequences: how many were used.
        length: tokens a sequence.
        select: how they were chosen from those read: `all`, `random`, `top` or `bottom`.
    """

    source: str
    sequences: Count
    length: Count
    select: str


class KeptPredictions(Part):
    """How the original's predictions were kept during a search.

    Attributes:
        form: `head_inputs`, `top_k` or `none`.
        bytes: memory they took.
        largest_share_of_kl_missed: by the top k, on the first batch of a trial, in 0..1; None while exact or not
            measured.
    """

    form: str
    bytes: Count
    largest_share_of_kl_missed: Measured


class SearchTimes(Part):
    """Where the time of a search went, in seconds.

    Attributes:
        bare_forward: one forward pass of the original over the samples.
        trials: all trials.
        optimiser: all proposals.
    """

    bare_forward: float
    trials: float
    optimiser: float


class SearchSummary(Part):
    """What a search did. Its trials are in `trials.jsonl` beside the report.

    Attributes:
        space: the space searched, such as `5x1` or `spectral`.
        trials: how many.
        failed: of these, how many had an objective that is not finite.
        best_trial: number of the best one, from 0.
        best_origin: where its point came from: a start, `spread` or `proposed`.
        objective: its objective, perplexity, and divergence from the original in nats a token.
        dense_nll: the original's mean loss on the samples, in nats a token.
        validation: the samples.
        predictions: how the original's predictions were kept.
        seconds: where the time went.
    """

    space: str | None
    trials: Count
    failed: Count
    best_trial: Count
    best_origin: str
    objective: Outcome
    dense_nll: float
    validation: ValidationText
    predictions: KeptPredictions
    seconds: SearchTimes


class SiteReport(Part):
    """One linear weight W of shape (m, n): what was decided of it, how it is stored, and how that came out.

    Attributes:
        block: index of its block.
        role: such as `q` or `down`.
        shape: `(m, n)`, outputs by inputs.
        rank: of L R; 0 for none, None for a weight left as it was.
        q_bits: bits a weight of Q, 0 for no Q; None where nothing is coded.
        lr_bits: bits of the entries of L and R; None where there is no L R or nothing is coded.
        damping: what the method's metric needed, relative to its mean diagonal.
        dropped_energy: share of the method's energy that was cut off, in 0..1; None where nothing is ordered.
        errors: tr(E H E^T) / tr(W H W^T) after each outer iteration; empty where there are none.
        iteration_kept: the iteration that the factors are of, from 1.
        error: the error of that iteration.
        fallback: whether H was zero, and the identity stood for it.
        bits: that the site takes in all, its bias not counted; None for a weight left as it was, and where 0.1.0 did
            not say.
        storage: `two_factor`, `pivoted` or `quantized`; None for a weight left as it was.
        largest_pivot_entry: largest magnitude in the map from pivot rows to the others.
    """

    block: Count
    role: str
    shape: tuple[Count, Count]
    rank: Count | None
    q_bits: Count | None = None
    lr_bits: Count | None = None
    damping: Measured = None
    dropped_energy: Measured = None
    errors: tuple[float, ...] = ()
    iteration_kept: Count | None = None
    error: float | None = None
    fallback: bool = False
    bits: Count | None = None
    storage: Literal["two_factor", "pivoted", "quantized"] | None = None
    largest_pivot_entry: Measured = None

    @model_validator(mode="after")
    def _of_a_cut_there_is(self) -> SiteReport:
        # Files of 0.1.0 give the bits of L and R in the recipe alone.
        if not self.q_bits or "lr_bits" in self.model_fields_set:
            _ = self.cut
        return self

    @property
    def cut(self) -> Cut:
        """What was decided of the weight."""
        return Cut(self.rank, self.q_bits or 0, self.lr_bits)

    @classmethod
    def of(cls, site: Site, cut: Cut, **facts: Any) -> SiteReport:
        """A site under a cut.

        Args:
            site: which one.
            cut: what was decided of it.
            **facts: further attributes.
        """
        return cls(block=site.block, role=site.role, shape=(site.m, site.n), **cut_facts(cut), **facts)

    def with_cut(self, cut: Cut, **facts: Any) -> SiteReport:
        """The same site under another cut.

        Args:
            cut: what holds of it now.
            **facts: attributes that are new.
        """
        return SiteReport(**{**self.model_dump(), **cut_facts(cut), **facts})


def cut_facts(cut: Cut) -> dict[str, int | None]:
    """What a report says of a cut: its rank, None for dense, and bits where it is coded."""
    bits = {"q_bits": cut.q_bits, "lr_bits": cut.lr_bits} if cut.coded else {}
    return {"rank": cut.rank, **bits}


class Machine(Part):
    """Where a run took place; the versions are those it ran with.

    Attributes:
        device: the processor or accelerator, in words.
        system: operating system and architecture.
        python: version.
        torch: version.
        transformers: version.
        rankwise: version.
    """

    device: str
    system: str | None = None
    python: str | None = None
    torch: str | None = None
    transformers: str | None = None
    rankwise: str
