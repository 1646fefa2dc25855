"""What a report says of trainings: repairs while a model is compressed, and fine-tunings after it."""

from __future__ import annotations

from rankwise.evaluation import Cost
from rankwise.reports.parts import Count, Measured, Part, Plain, Score, Settings


class FineTuneSettings(Settings):
    """What was asked of a fine-tuning.

    Attributes:
        method: `subspace`, `lora`, `full-factors` or `lowrank`.
        data: text source it learned from.
        settings: of the method, as they held.
    """

    method: str
    data: str
    settings: dict[str, Plain]


class TrainingStep(Part):
    """A point of a loss curve.

    Attributes:
        step: of the optimiser, from 1.
        loss: a token, in nats.
        lr: step size.
    """

    step: Count
    loss: Measured
    lr: float


class LearnedText(Part):
    """What a repair learned from.

    Attributes:
        source: of the text.
        count: examples.
        tokens: of all examples that were learned from.
    """

    source: str
    count: Count
    tokens: Count


class BlockRepair(Part):
    """What a repair did to one block.

    Attributes:
        block: its index.
        objective_before: validation objective before.
        objective_after: and after, undone or not.
        accepted: whether it stayed; where the objective did not fall it was undone.
        loss_first: of the training, at its first step.
        loss_last: at its last.
        steps: of the optimiser.
    """

    block: Count
    objective_before: Measured
    objective_after: Measured
    accepted: bool
    loss_first: Measured = None
    loss_last: Measured = None
    steps: Count | None = None


class RepairStep(Part):
    """What one step of the repair did.

    Attributes:
        step: `refit`, `blocks`, `subspace`, `factors` or `lora`.
        objective_before: validation objective before.
        objective_after: and after.
        accepted: whether anything of it stayed.
        blocks: block by block, of `refit` and `blocks`.
        examples: what `subspace`, `factors` and `lora` learned from.
        trained_parameters: how many these trained.
        history: their loss curve.
        norm_lost_in_merging: by site, the share of its squared norm that was lost when adapters were merged, in 0..1;
            None where there were none.
        seconds: it took.
    """

    step: str
    objective_before: Measured
    objective_after: Measured
    accepted: bool
    blocks: tuple[BlockRepair, ...] = ()
    examples: LearnedText | None = None
    trained_parameters: Count | None = None
    history: tuple[TrainingStep, ...] = ()
    norm_lost_in_merging: dict[str, Measured] | None = None
    seconds: float


class ExampleCounts(Part):
    """What a fine-tuning learned from.

    Attributes:
        count: examples.
        held_out: further ones, by which it was judged.
        tokens: of the examples learned from.
        trained_tokens: that steps were taken on, those of every pass counted; None where it is not known.
    """

    count: Count
    held_out: Count
    tokens: Count
    trained_tokens: Count | None = None


class FineTuneStep(Part):
    """What one fine-tuning of the compressed checkpoint did.

    Attributes:
        settings: what was asked.
        examples: what it learned from.
        before: perplexity before; None when no text was given.
        after: and after.
        trained_parameters: how many were trained.
        history: the loss curve.
        norm_lost_in_merging: by site, the share of its squared norm that was lost when adapters were merged, in 0..1;
            None where there were none.
        loss_before: a token of the examples held out, in nats, before.
        loss_after: and after, undone or not.
        accepted: whether the training stayed; where the loss did not fall it was undone.
        cost_before: size before.
    """

    settings: FineTuneSettings
    examples: ExampleCounts
    before: Score | None
    after: Score | None
    trained_parameters: Count
    history: tuple[TrainingStep, ...]
    norm_lost_in_merging: dict[str, Measured] | None = None
    loss_before: Measured
    loss_after: Measured
    accepted: bool
    cost_before: Cost
