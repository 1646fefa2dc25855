"""How fast a model generates: a short greedy decode, by the clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

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
    context = getattr(model.config, "max_position_embeddings", None)
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
