"""Talking to a model: its chat template, and an answer that is handed over as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rankwise.errors import DataError

Turn = dict[str, str]
"""One thing said: `{"role": "user" or "assistant", "content": text}`."""


def is_chat(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a chat template, as those of instruction models do."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_ids(tokenizer: Any, turns: Sequence[Turn]) -> dict[str, Any]:
    """Token ids of a conversation up to where the model is to speak, and their mask, shape `[1, tokens]` each.

    Raises:
        DataError: when the tokenizer has no chat template.
    """
    if tokenizer is None or not is_chat(tokenizer):
        raise DataError(
            "The model has no chat template, so it cannot be talked to.",
            remedy="use rankwise generate, or a model that follows instructions",
        )
    found = tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


class _Pieces:
    """What `generate` of transformers streams to: whole characters, as soon as they are known."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] = []
        self._shown = ""
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # Half a character decodes to a sign that the rest of it replaces.
        if text.startswith(self._shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._say(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.startswith(self._shown):
            self._say(text[len(self._shown) :])
        self._shown = text

    @property
    def text(self) -> str:
        return self._shown


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    turns: Sequence[Turn],
    say: Callable[[str], None],
    *,
    new_tokens: int = 256,
    temperature: float = 0.0,
) -> str:
    """Answer a conversation.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        turns: what was said, the last by the user.
        say: called with each piece of the answer.
        new_tokens: most tokens of the answer.
        temperature: 0 decodes greedily, else samples at this temperature with top-p 0.95.

    Returns:
        The answer.

    Raises:
        DataError: when the tokenizer has no chat template.
    """
    ids = {name: value.to(model.device) for name, value in chat_ids(tokenizer, turns).items()}
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pieces = _Pieces(tokenizer, say)
    model.generate(**ids, max_new_tokens=new_tokens, pad_token_id=pad, streamer=pieces, **options)
    return pieces.text
