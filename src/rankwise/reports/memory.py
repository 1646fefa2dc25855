"""How the model was held in memory, what that was expected to take, and what it took."""

from __future__ import annotations

from typing import Literal

from rankwise.reports.parts import Part


class MemoryUse(Part):
    """Memory of the host that no file stands behind.

    Attributes:
        mode: `whole`, `blocks` or `disk`.
        expected_bytes: the estimate made before the run; None where none could be made.
        used_bytes: the most that any stage before the checkpoint was written took; None where the system does not say.
    """

    mode: Literal["whole", "blocks", "disk"]
    expected_bytes: int | None
    used_bytes: int | None
