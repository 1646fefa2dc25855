"""Perplexity: exp of the mean negative log-likelihood over every scored token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankwise.errors import DataError, NotFiniteError
from rankwise.evaluation.not_finite import not_finite
from rankwise.models import Head
from rankwise.progress import Reporter

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp(mean NLL), natural logarithm.
        tokens: scored tokens.
        windows: sequences the model saw.
        length: tokens a window.
        stride: tokens from one window's start to the next; the length when windows do not overlap.
        bos: the start token that each window begins with, before its text; None for none.
    """

    perplexity: float
    tokens: int
    windows: int
    length: int
    stride: int
    bos: int | None = None


def scored_windows(ids: Tensor, stride: int | None, bos: int | None = None) -> tuple[Tensor, int]:
    """Overlapping windows over packed sequences.

    Args:
        ids: shape `[sequences, length]`, contiguous text when `stride` is smaller than the length.
        stride: None or the length for windows without overlap.
        bos: the start token that each sequence begins with, if any. Windows that overlap are cut from the text without
            it, and each begins with it again.

    Returns:
        Windows `[windows, length]`, and the stride.

    Raises:
        DataError: when the stride is not in 1..length, or a start token leaves no room for it.
    """
    length = ids.shape[1]
    stride = stride or length
    # A start token is no text: windows that step by as much as they hold do not overlap.
    text = length if bos is None else length - 1
    if not 1 <= stride <= length:
        raise DataError(
            f"A stride of {stride} does not fit windows of {length}.", where="stride", remedy="use 1..length"
        )
    if stride >= text:
        return ids, length
    rows = ids[:, length - text :].flatten().unfold(0, text, stride)
    if bos is not None:
        rows = torch.cat((rows.new_full((len(rows), 1), bos), rows), dim=1)
    return rows, stride


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Tensor,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    reporter: Reporter | None = None,
    description: str = "perplexity",
    bos: int | None = None,
) -> Perplexity:
    """Score every token that has a predecessor in its window, once.

    With a stride below the length the first window scores all but its first token, each later one its last `stride`.

    Args:
        model: causal language model in evaluation mode.
        ids: shape `[sequences, length]`.
        stride: see `scored_windows`.
        batch_size: windows per batch.
        reporter: shows progress.
        description: what the progress bar says.
        bos: the start token that each sequence begins with, if any; see `scored_windows`.

    Raises:
        NotFiniteError: when the loss of a window is not finite, naming the windows, the layer and the token.
        DataError: when windows are shorter than two tokens.
    """
    reporter = reporter or Reporter(show=False)
    windows, stride = scored_windows(ids, stride, bos)
    length = windows.shape[1]
    if length < 2:
        raise DataError(
            "A window of one token has nothing to score.", where="length", remedy="use a length of 2 or more"
        )
    device = next(model.parameters()).device
    head = Head(model, windows)
    total, tokens = 0.0, 0
    starts = range(0, len(windows), batch_size)
    for start in reporter.track(starts, description, total=len(starts)):
        batch = windows[start : start + batch_size].to(device)
        logits, targets = head(batch).predicting(), batch[:, 1:].flatten()
        parts = [cross_entropy(logits.of(part).float(), targets[part], reduction="none") for part in logits.parts()]
        losses = torch.cat(parts).view(len(batch), -1)
        if stride < length:
            fresh = torch.ones_like(losses, dtype=torch.bool)
            fresh[(1 if start == 0 else 0) :, : length - 1 - stride] = False
            losses = losses[fresh]
        batch_total = float(losses.double().sum())
        if not math.isfinite(batch_total):
            raise not_finite(model, batch, "loss", f"windows {start} to {start + len(batch) - 1}")
        total += batch_total
        tokens += losses.numel()
    mean = total / tokens
    if mean > _LARGEST_EXPONENT:
        raise NotFiniteError(
            f"The mean loss of {mean:.0f} has no perplexity in double precision.",
            where=description,
            remedy="the model is destroyed; keep more of it",
        )
    return Perplexity(math.exp(mean), tokens, len(windows), length, stride, bos)
