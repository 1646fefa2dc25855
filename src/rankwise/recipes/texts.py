"""The texts of a run: what calibrates, what a search is judged on, what is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rankwise.data import Start
from rankwise.recipes.values import Count, Length, Node, Seed, Skipped, SourceText

_SEQUENCES, _SEQUENCES_ON_CPU = 256, 24
_GRADIENT_SEQUENCES_ON_CPU = 6


class _Text(Node):
    """Text that is read as sequences."""

    sequences: Count | Literal["auto"] | None = None

    def counted(self, device: str) -> int | None:
        """How many sequences are read; None for all.

        Args:
            device: type of the device that computes, `cpu` or such.
        """
        if self.sequences == "auto":
            return _SEQUENCES_ON_CPU if device == "cpu" else _SEQUENCES
        return self.sequences


class Calibration(_Text):
    """The text whose statistics steer the factorisation.

    Attributes:
        source: see `rankwise.data.sources` for the grammar.
        sequences: how many; None for all. `auto` is 256, and 24 where a CPU computes.
        length: tokens a sequence; None means the smaller of 512 and the model's context, and for a `tokens:` source of
            shape `[sequences, tokens]` its own.
        gradient_sequences: at how many of them, the first, gradients are taken, which take several times as long as
            inputs; None for all. `auto` is all, and 6 where a CPU computes and `sequences` is `auto`
            (`benchmarks/results/text.md`).
        sample: `random` draws sequences by the recipe's seed, `first` takes them from the start.
        batch_size: sequences a batch.
        bos: whether each sequence begins with the tokenizer's start token: `always`, `never`, or `auto`, where the
            tokenizer itself puts it before a text.
    """

    source: SourceText = "bundled"
    sequences: Count | Literal["auto"] | None = "auto"
    gradient_sequences: Count | Literal["auto"] | None = "auto"
    length: Length | None = None
    sample: Literal["random", "first"] = "random"
    batch_size: Count = 8
    bos: Start = "auto"

    def gradients_at(self, count: int, device: str) -> int:
        """At how many of the sequences that were read gradients are taken.

        Args:
            count: sequences that were read.
            device: as for `counted`.
        """
        asked = self.gradient_sequences
        if asked == "auto":
            asked = _GRADIENT_SEQUENCES_ON_CPU if self.sequences == "auto" and device == "cpu" else None
        return count if asked is None else min(asked, count)


class Evaluation(_Text):
    """Text on which dense and compressed model are scored after compression.

    Attributes:
        source: as for calibration.
        skip: sequences skipped at the start.
        sequences: how many; None for all.
        sample: `first` takes them from the start, `random` draws them by `seed`.
        seed: for drawing.
        length: as for calibration.
        stride: tokens from window to window; None for no overlap.
        batch_size: windows a batch.
        bos: as for calibration.
        speed: whether a short decode is timed before and after, too.
    """

    source: SourceText
    skip: Skipped = 0
    sequences: Count | None = None
    sample: Literal["random", "first"] = "first"
    seed: Seed = 0
    length: Length | None = None
    stride: Count | None = None
    batch_size: Count = 8
    bos: Start = "auto"
    speed: bool = True


class Validation(_Text):
    """Samples on which a search judges its plans.

    Attributes:
        source: as for calibration. None takes sequences of the calibration source that calibration did not use.
        skip: sequences skipped at the start.
        sequences: how many are read; None for all.
        sample: `random` draws them by the recipe's seed, `first` takes them from the start.
        length: as for calibration.
        batch_size: sequences a batch.
        bos: as for calibration.
        select: which of those read are used: `all`, or `count` of them: `random`, or the `top` or `bottom` by how much
            their perplexity varies over random plans (Bolaco, section 3.2).
        count: for `random`, `top` and `bottom`.
        plans: random plans for `top` and `bottom`; each costs one forward pass over all that is read.
    """

    source: SourceText | None = None
    skip: Skipped = 0
    sequences: Count | None = 32
    sample: Literal["random", "first"] = "random"
    length: Length | None = None
    batch_size: Count = 8
    bos: Start = "auto"
    select: Literal["all", "random", "top", "bottom"] = "all"
    count: Count = 32
    plans: Annotated[int, Field(ge=2)] = 20
