"""How fast a model reads and generates, by the clock; several models take turns, so that both see the same machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rankwise.models import text_config
from rankwise.progress import Reporter, anonymous_bytes

SECONDS = 2.0
"""That a measurement takes at most, but for a prompt and a step that take longer by themselves."""

TOKENS = 32
"""That are generated at most, after one that is not timed."""

PROMPT = 16
"""Tokens that are there before."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def decode_speed(model: Any, prompt: Tensor, *, seconds: float = SECONDS, tokens: int = TOKENS) -> float:
    """Tokens a second of one sequence, one token a step, the prompt and the first step not counted.

    Args:
        model: causal language model in evaluation mode.
        prompt: token ids, shape `[p]`; the first `PROMPT` of them are read.
        seconds: after which no further step begins.
        tokens: most steps; fewer where the model's context ends before.
    """
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    if context is not None:
        prompt = prompt[: max(1, context - tokens - 2)]
        tokens = max(1, min(tokens, context - len(prompt[:PROMPT]) - 2))
    ids = prompt[:PROMPT][None].to(model.device)
    past, done, started = None, 0, 0.0
    for step in range(tokens + 2):
        if step == 2:
            # What happens once, such as decoding weights that are kept, is over.
            _wait(model.device)
            started = time.perf_counter()
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        _wait(model.device)
        done = step - 1
        if step > 1 and time.perf_counter() - started >= seconds:
            break
    return done / max(time.perf_counter() - started, 1e-9)


@dataclass(frozen=True)
class Spread:
    """A figure measured several times.

    Attributes:
        middle: median.
        least: smallest.
        most: largest.
    """

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Speeds:
    """How fast one model is.

    Attributes:
        prefill: tokens a second of a prompt that is read in one pass.
        first_token: seconds from the prompt to the first new token.
        decode: tokens a second of one sequence, one token a step.
        peak_bytes: most memory while it ran beyond what was there before, its weights not among it; None where neither
            the system nor the device says.
    """

    prefill: Spread
    first_token: Spread
    decode: Spread
    peak_bytes: int | None


def _memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else anonymous_bytes()


@torch.no_grad()
def _round(model: Any, prompt: Tensor, tokens: int) -> tuple[float, float, int]:
    """Seconds of one prefill, seconds of `tokens` steps, and bytes of memory at the end of them."""
    ids = prompt[None].to(model.device)
    _wait(model.device)
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True)
    ids = out.logits[:, -1:].argmax(-1)
    _wait(model.device)
    read = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
    _wait(model.device)
    return read - started, time.perf_counter() - read, _memory(model.device) or 0


def measure_speeds(
    models: Mapping[str, Any],
    prompt: Tensor,
    *,
    tokens: int = TOKENS,
    rounds: int = 5,
    reporter: Reporter | None = None,
) -> dict[str, Speeds]:
    """Time reading a prompt and generating after it, model by model in turn, round by round.

    The first round warms up and is not counted.

    Args:
        models: by name, causal language models in evaluation mode.
        prompt: token ids, shape `[p]`.
        tokens: generated a round.
        rounds: counted rounds.
        reporter: shows progress.
    """
    reporter = reporter or Reporter(show=False)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, int | None] = dict.fromkeys(models)
    for turn in reporter.track(range(rounds + 1), "speed, rounds", total=rounds + 1):
        for name, model in models.items():
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            before = _memory(model.device)
            read, stepped, memory = _round(model, prompt, tokens)
            if turn:
                found[name].append((read, stepped))
            if before is not None:
                peaks[name] = max(peaks[name] or 0, memory - before)
    return {
        name: Speeds(
            prefill=Spread.of([len(prompt) / read for read, _ in times]),
            first_token=Spread.of([read for read, _ in times]),
            decode=Spread.of([tokens / stepped for _, stepped in times]),
            peak_bytes=peaks[name],
        )
        for name, times in found.items()
    }
