"""What the methods that quantise have in common: codebook, rotation, Hessian, and the sizes that follow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from rankwise.errors import BudgetError, RankwiseError
from rankwise.factors import Basis, Factors
from rankwise.linalg import InputMetric, OutputMetric, decompose
from rankwise.methods.base import Method, Outlook
from rankwise.quantizers import (
    Codebook,
    Hessian,
    OutputFeedback,
    Packed,
    Rotation,
    Target,
    codebook_class,
    codebook_named,
    full_codebook_name,
    improve,
    ldlq,
    round_along_both,
)
from rankwise.sizes import FULL_BITS, Budget, Candidates, Form, coded_candidates
from rankwise.statistics import SiteStatistics, Statistic
from rankwise.statistics.curvature import Curvature
from rankwise.statistics.input_moments import InputMoments

_PLAN_DAMPING = 1.0
"""Of the curvature, as in `two_sided`."""

CURVATURE = Curvature(labels="sampled")
"""What a plan looks at beside the inputs."""

_BITS_FOR_RANK = 2.0
"""Bits a weight that L R takes at most beside a Q, where a plan is made by loss: a finer Q is then the better one."""


def _found(name: str) -> str:
    try:
        return full_codebook_name(name)
    except RankwiseError as problem:
        raise ValueError(f"{problem.problem} {problem.remedy or ''}".strip()) from None


KnownCodebook = Annotated[str, AfterValidator(_found)]
"""The name of a codebook that is there; of one's own with the version of its code."""


class QuantizingMethod(Method):
    """A method that gives codes of few bits.

    Attributes:
        codebook: of Q: `e8p` (2 to 4 bits), `uniform` or `nf` (2 to 8), or one's own: `FILE.py:Class`, or the name of
            an entry point.
        q_bits: bits a weight of Q. None lets a budget of bits choose.
        group: columns of Q that share a scale, a multiple of eight; 0 for none.
        row_scales: whether each row of Q has a scale of its own, 16 / n bits a weight; without, the lattice has one for
            the whole matrix.
        hadamard: whether W is rotated at random on both sides.
        feedback: whether rounding feeds its errors back (LDLQ). Without, every weight goes to the nearest.
        output_feedback: whether it feeds them back along the outputs too, which weigh by the curvature of the loss
            (two-sided rounding). Not where nothing is fed back along the inputs, and not beside `passes`.
        damping: added to H relative to its mean diagonal; raised tenfold if H is not positive definite. Of 1e-4 to 0.1,
            0.01 is within 2.5% of the least divergence in every column of benchmarks/results/defaults_codes.md.
        output_damping: added to the curvature that outputs weigh by, relative to its mean diagonal, for feedback along
            them: benchmarks/results/defaults_codes.md.
        passes: over all blocks after LDLQ, each re-rounding a block with all others given.
    """

    one_unit: ClassVar[bool] = True
    default_keep: ClassVar[float | None] = None
    keeps_factors: ClassVar[bool] = False
    rounds: ClassVar[bool] = True

    codebook: KnownCodebook = "e8p"
    q_bits: Annotated[int, Field(ge=0, le=8)] | None = None
    group: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    row_scales: bool = True
    hadamard: bool = True
    feedback: bool = True
    output_feedback: bool = True
    damping: Annotated[float, Field(gt=0)] = 0.01
    output_damping: Annotated[float, Field(gt=0)] = 0.5
    passes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _known_bits(self) -> QuantizingMethod:
        if self.q_bits:
            try:
                codebook_named(self.codebook, self.q_bits)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy}") from None
        return self

    @property
    @abstractmethod
    def given_rank(self) -> int | None:
        """The rank that the settings fix; None when a budget chooses it."""

    @property
    def beside_bits(self) -> int | None:
        """Bits of L and R; None for a method without L R."""
        return None

    def check_size(self, asked: Budget, allocation: str) -> None:
        if asked.storage != "auto":
            raise ValueError(f"{self.name} stores codes: budget.storage means nothing to it")
        settings = {"q_bits": self.q_bits, "rank": self.given_rank}
        if not asked.sized:
            missing = [option for option, value in settings.items() if value is None]
            if missing and allocation != "plan":
                raise ValueError(
                    f"{self.name} needs {' and '.join(missing)}, or a size (keep, bits or size) to choose by"
                )
            if allocation not in ("uniform", "plan"):
                raise ValueError(f"the allocation {allocation} spends bits: give budget.bits, keep or size")
        elif None not in settings.values():
            given = " and ".join(option for option in settings if option in type(self).model_fields)
            raise ValueError(f"a size is given beside {given}: leave something to be chosen")

    @property
    def feeds_outputs(self) -> bool:
        """Whether errors are fed back along the outputs."""
        return self.output_feedback and self.feedback and not self.passes

    def requests(self) -> tuple[Statistic, ...]:
        return (InputMoments(), CURVATURE) if self.feeds_outputs else (InputMoments(),)

    def plan_requests(self) -> tuple[Statistic, ...]:
        return () if CURVATURE in self.requests() else (CURVATURE,)

    def along_outputs(self, statistics: SiteStatistics, rotation: Rotation) -> OutputFeedback | None:
        """Feedback along the rotated outputs; None without it, and where nothing that happens here changes the loss.

        Args:
            statistics: what was collected at this site.
            rotation: of both sides.
        """
        # A method of one's own may ask for less.
        if not self.feeds_outputs or CURVATURE not in self.requests():
            return None
        blocks = statistics.of(CURVATURE).float()
        if not blocks.any():
            return None
        return OutputFeedback.of(rotation.curvature(torch.block_diag(*blocks)), self.output_damping)

    def form(self, budget: Budget, number_bits: int) -> Form:
        return Form(
            storage=budget.storage,
            number_bits=number_bits,
            codebook=self.codebook,
            group=self.group,
            row_scales=self.row_scales,
            hadamard=self.hadamard,
        )

    @property
    def choices(self) -> tuple[int, ...]:
        """Bits a weight that Q may have, ascending."""
        return tuple(codebook_class(self.codebook).known_bits) if self.q_bits is None else (self.q_bits,)

    def candidates(self, shape: tuple[int, int], form: Form, multiple: int, looks: bool) -> Candidates:
        rank, most = self.given_rank, float(min(FULL_BITS, self.choices[-1] + _BITS_FOR_RANK))
        if rank is not None and rank > min(shape):
            raise BudgetError(
                f"The rank {rank} is above min(m, n) = {min(shape)}.",
                where=f"a weight {list(shape)}",
                remedy="lower --rank, or give --bits and let each site have its own",
            )
        ranks = range(0, min(shape) + 1, multiple) if rank is None else (rank,)
        found = coded_candidates(shape, form, self.choices, self.beside_bits, ranks, most)
        return found.within(shape, _BITS_FOR_RANK) if looks and rank is None else found

    def codes(self, q_bits: int) -> Codebook:
        """Q's codebook."""
        return codebook_named(self.codebook, q_bits, self.group, self.row_scales)

    @abstractmethod
    def alone(
        self, weight: Tensor, hessian: Hessian, rotation: Rotation, q_bits: int, outputs: OutputFeedback | None
    ) -> Packed:
        """Q without L R: codes of the rotated weight.

        Args:
            weight: W, shape `[m, n]`, float64.
            hessian: of the inputs, damped, not rotated.
            rotation: of both sides.
            q_bits: bits a weight.
            outputs: feedback along the rotated outputs.
        """

    def outlook(self, weight: Tensor, statistics: SiteStatistics, q_bits: int, source: torch.Generator) -> Outlook:
        """Q alone, and what it leaves: how much loss each rank beside it would save.

        Losses estimate twice the loss a token as those of `two_sided` do, so they compare between sites.
        """
        seen = statistics.of(InputMoments()).second_moment().to(weight)
        hessian = Hessian.of(seen, self.damping)
        rotation = drawn_rotation(self, weight, source)
        q = None
        if q_bits:
            q = self.alone(weight, hessian, rotation, q_bits, self.along_outputs(statistics, rotation))
        rest = weight if q is None else weight - Factors(None, None, q=q, rotation=rotation).reconstruct()
        curvature = statistics.of(CURVATURE).to(weight)
        if self.given_rank == 0:
            # Nothing stands beside Q: its own loss says it all.
            loss = (weighed_by_blocks(curvature, rest) * (rest @ seen)).sum().reshape(1)
            return Outlook(
                Basis(weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1]), loss), q, rotation
            )
        inputs = InputMetric(hessian.matrix)
        if not curvature.any():
            # Nothing that happens here changes the loss.
            found = decompose(rest, inputs=inputs)
            return Outlook(Basis(found.left, found.right, torch.zeros_like(found.energy)), q, rotation)
        metric = OutputMetric.of(curvature, _PLAN_DAMPING)
        found = decompose(rest, inputs=inputs, metric=metric)
        # Both dampings only steer the directions: what is counted is the loss by the measured metrics.
        measured = ((found.right @ seen) * found.right).sum(1)
        damped = ((found.right @ hessian.matrix) * found.right).sum(1)
        shares = metric.undamped_share(found.left) * (measured / damped.clamp_min(torch.finfo(seen.dtype).tiny))
        basis = Basis(found.left, found.right, found.energy * shares.clamp(0, 1), damping=metric.damping)
        return Outlook(basis, q, rotation)


def weighed_by_blocks(blocks: Tensor, error: Tensor) -> Tensor:
    """F E for F in diagonal blocks, shape `[k, b, b]`, and E of shape `[m, n]`."""
    count, size, _ = blocks.shape
    return (blocks @ error.reshape(count, size, -1)).reshape(error.shape)


def rounded(
    method: QuantizingMethod,
    codebook: Codebook,
    target: Tensor,
    hessian: Tensor,
    feedback: Tensor | None,
    scale: Tensor | None = None,
    outputs: OutputFeedback | None = None,
) -> Packed:
    """Q for a target, by feedback or to the nearest.

    Args:
        method: its settings.
        codebook: Q's.
        target: shape `[m, n]`.
        hessian: H, shape `[n, n]`.
        feedback: U of H; None to round to the nearest.
        scale: as `Packed.scale`; None for that of the target.
        outputs: feedback along the outputs beside that along the inputs.
    """
    scale = codebook.scales(target, feedback=feedback is not None) if scale is None else scale
    if feedback is None:
        return codebook.quantize(target, scale)
    if outputs is not None:
        return round_along_both(Target(target, feedback, scale), outputs.feedback, codebook)
    packed = ldlq(target, feedback, codebook, scale)
    return improve(target, hessian, packed, codebook, method.passes)


def on(packed: Packed, like: Tensor) -> Packed:
    """Codes that were kept, beside a tensor: on its device, scales in its dtype."""
    return replace(packed, codes=packed.codes.to(like.device), scale=packed.scale.to(like))


def drawn_rotation(method: QuantizingMethod, weight: Tensor, source: torch.Generator) -> Rotation:
    """The rotation a method asks for."""
    if not method.hadamard:
        return Rotation(None, None)
    return Rotation.drawn(weight.shape[0], weight.shape[1], source)
