"""`BlockNames`: what families call the norms of a block, its attention and its MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""Names of the norm behind the last block, beside the list of blocks."""

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms of single heads (Qwen3, Cohere), which never see the stream."""


@dataclass(frozen=True)
class BlockNames:
    """Names of a block's children.

    Attributes:
        norms: before attention and before the MLP; one where it serves both.
        attention: of attention.
        mlp: of what makes up the MLP, in the order in which it runs.
    """

    norms: tuple[str, ...]
    attention: str
    mlp: tuple[str, ...] = ("mlp",)

    @classmethod
    def of(cls, block: nn.Module) -> BlockNames | None:
        """Those of a block: the first in the table of which it has every child; None where there is none."""
        return next((names for names in _TABLE if all(_has(block, name) for name in names.all)), None)

    @property
    def all(self) -> tuple[str, ...]:
        """Names of all children."""
        return (*self.norms, self.attention, *self.mlp)

    def parts(self, half: int) -> tuple[str, ...]:
        """What makes up attention (0) or the MLP (1)."""
        return self.mlp if half else (self.attention,)

    def norm(self, half: int) -> str:
        """The norm before attention (0) or the MLP (1)."""
        return self.norms[min(half, len(self.norms) - 1)]


def _has(block: Any, name: str) -> bool:
    return isinstance(getattr(block, name, None), nn.Module)


_TWO, _ONE = ("input_layernorm", "post_attention_layernorm"), ("input_layernorm",)

_TABLE = (
    BlockNames(_TWO, "self_attn"),  # Llama, Mistral, Qwen, Phi-3, StableLM, Starcoder2
    BlockNames(_ONE, "self_attn"),  # Phi, Cohere, StableLM side by side
    BlockNames(("self_attn_layer_norm", "final_layer_norm"), "self_attn", ("fc1", "activation_fn", "fc2")),  # OPT
    BlockNames(_TWO, "attention"),  # GPT-NeoX
    BlockNames(_TWO, "self_attention"),  # Falcon-RW
    BlockNames(_ONE, "self_attention"),  # Falcon-7B
    BlockNames(("ln_attn", "ln_mlp"), "self_attention"),  # Falcon-40B
    BlockNames(("ln_1", "ln_2"), "attn"),  # GPT-2, GPT-Neo
    BlockNames(("ln_1",), "attn"),  # GPT-J, CodeGen
)
"""Longer ones before those that they hold all names of. Whether a block does what its names say is tried."""
