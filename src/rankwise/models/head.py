"""Logits a few tokens at a time: with a vocabulary of 100,000 those of one batch are larger than many a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.device import computing
from rankwise.models.forwards import forward_of

LOGITS = 2**24
"""Most logits that are made at a time."""

_PROBE = 8
_AGREEMENT = 0.02
"""Difference allowed, relative to the largest logit: above the rounding of bfloat16."""

Loss = Callable[[Tensor, slice], Tensor]
"""Logits of some tokens, shape `[part, vocabulary]`, and which tokens these are -> a loss summed over them."""


class Head:
    """What a causal language model makes of its decoder's hidden states, applied to a few tokens at a time.

    The model's own forward does it, with its decoder giving back hidden states that are there already: whatever a model
    does to logits besides (scales, soft caps) is done. Where a model does not let itself be cut there, the hidden
    states are the logits themselves, all at once.

    Args:
        model: causal language model; its layers may be exchanged later.
        probe: token ids, shape `[sequences, tokens]`, on which the cut is tried.
    """

    def __init__(self, model: Any, probe: Tensor) -> None:
        self._model = model
        self._output: type | None = None
        self._decoder: Any = getattr(model, "get_decoder", lambda: model)()
        self.vocabulary = 0
        if not self._agrees(probe[:1, :_PROBE].to(next(model.parameters()).device)):
            self._decoder = None

    @property
    def apart(self) -> bool:
        """Whether logits are made apart from hidden states."""
        return self._decoder is not None

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Logits:
        """Run the decoder; its logits are made when they are asked for.

        Args:
            ids: shape `[sequences, tokens]`, on the model's device.
            mask: attention mask of the same shape, or None.
        """
        options = {} if mask is None else {"attention_mask": mask}
        if self._decoder is None:
            return Logits(self, self._model(input_ids=ids, use_cache=False, **options).logits)
        seen: list[Tensor] = []
        real = self._decoder.forward

        def keep(*positional: Any, **named: Any) -> Any:
            found = real(*positional, **named)
            self._output = type(found)
            seen.append(found.last_hidden_state)
            return self._output(last_hidden_state=found.last_hidden_state[:, :1])

        with forward_of(self._decoder, keep):
            self._model(input_ids=ids, use_cache=False, **options)
        return Logits(self, seen[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of few tokens, shape `[tokens, vocabulary]`, from hidden states, shape `[tokens, d]`."""
        if self._decoder is None or self._output is None:
            return hidden
        given = self._output(last_hidden_state=hidden[None])
        with forward_of(self._decoder, lambda *_, **__: given):
            filler = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self._model(input_ids=filler, use_cache=False).logits[0]

    @torch.no_grad()
    def _agrees(self, probe: Tensor) -> bool:
        """Whether logits made apart are those that the model gives."""
        with computing(self._model):
            whole = self._model(input_ids=probe, use_cache=False).logits[0].float()
        self.vocabulary = whole.shape[-1]
        if self._decoder is self._model:
            return False
        try:
            with computing(self._model):
                found = self.logits(self(probe).hidden[0]).float()
        except Exception:  # whatever a model of an unforeseen shape raises: it is then not cut
            return False
        scale = whole.abs().max()
        return found.shape == whole.shape and bool((found - whole).abs().max() <= _AGREEMENT * scale)


@dataclass(frozen=True)
class Logits:
    """Logits that are made when they are asked for, part by part.

    Attributes:
        head: makes them.
        hidden: of what, shape `[sequences, tokens, d]` or `[tokens, d]`.
    """

    head: Head
    hidden: Tensor

    def predicting(self, wanted: Tensor | None = None) -> Logits:
        """Those of all tokens but the last of each sequence, in one row.

        Args:
            wanted: which of them, shape `[sequences, tokens - 1]`; None for all.
        """
        hidden = self.hidden[:, :-1]
        return Logits(self.head, hidden.flatten(0, 1) if wanted is None else hidden[wanted])

    def parts(self) -> Iterator[slice]:
        """Slices of the tokens, each of at most `LOGITS` logits."""
        tokens, size = len(self.hidden), max(1, LOGITS // self.head.vocabulary)
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens))

    def of(self, part: slice) -> Tensor:
        """Logits of a slice of the tokens, shape `[part, vocabulary]`."""
        return self.head.logits(self.hidden[part])

    def sum(self, loss: Loss) -> Tensor:
        """The sum of a loss over all tokens; no more logits are held than of one part, in the backward pass neither."""
        if torch.is_grad_enabled() and self.hidden.requires_grad:
            total: Tensor = _Sum.apply(self.hidden, self, loss)
            return total
        total = self.hidden.new_zeros((), dtype=torch.float64)
        for part in self.parts():
            total += loss(self.of(part), part)
        return total


class _Sum(torch.autograd.Function):
    """A sum over parts whose gradient is taken while each is there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Logits, loss: Loss) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float64)
        for part in logits.parts():
            with torch.enable_grad():
                given = hidden[part].detach().requires_grad_()
                value = loss(logits.head.logits(given), part)
            gradient[part] = torch.autograd.grad(value, given)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outside: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * outside[0]).to(gradient.dtype), None, None
