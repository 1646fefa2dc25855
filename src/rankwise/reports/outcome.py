"""What a run took and came to, in figures of its machine and in words: memory, speed, a verdict."""

from __future__ import annotations

from typing import Literal

from rankwise.reports.parts import Part


class MemoryUse(Part):
    """Memory of the host that no file stands behind, and of the GPU.

    Attributes:
        mode: `whole`, `blocks` or `disk`.
        expected_bytes: the estimate made before the run; None where none could be made.
        used_bytes: the most that any stage before the checkpoint was written took; None where the system does not say.
        gpu_expected_bytes: the estimate of what tensors take on the GPU; None as above, and without a GPU.
        gpu_used_bytes: the most that they took in any stage before the checkpoint was written; None without a GPU.
    """

    mode: Literal["whole", "blocks", "disk"]
    expected_bytes: int | None
    used_bytes: int | None
    gpu_expected_bytes: int | None = None
    gpu_used_bytes: int | None = None


class Speed(Part):
    """How fast text is generated on the machine of the run, in tokens a second of one sequence.

    Attributes:
        before: of the original.
        after: of the result.
        decoded_once: whether quantised weights were decoded once and kept, as they are where memory allows.
    """

    before: float
    after: float
    decoded_once: bool = False


class Advice(Part):
    """A thing to try next.

    Attributes:
        what: options of the command line, in words where there are several.
        cost: time, size or both, in words.
    """

    what: str
    cost: str


class Verdict(Part):
    """What a compression lost, in plain words.

    Attributes:
        ratio: perplexity after over before; None where it is not known or not finite.
        usual: least and most that was measured at this size, None for no most; see `rankwise.reports.verdict`.
        lost: the sentence.
        next: what to try, in order.
    """

    ratio: float | None = None
    usual: tuple[float, float | None] | None = None
    lost: str
    next: tuple[Advice, ...] = ()
