"""The token that every sequence of text begins with, where the model was trained so."""

from __future__ import annotations

from typing import Any, Literal

from rankwise.errors import DataError

Start = Literal["auto", "always", "never"]
"""Whether sequences begin with the tokenizer's start token; `auto` does what the tokenizer does before a text."""


def adds_start(tokenizer: Any) -> bool:
    """Whether a tokenizer, left to itself, puts its start token before a text."""
    token = tokenizer.bos_token_id
    if token is None:
        return False
    whole, bare = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    return whole[:1] == [token] and bare[:1] != [token]


def start_token(tokenizer: Any, start: Start, where: str) -> int | None:
    """The id that every sequence begins with, or None.

    Args:
        tokenizer: the model's.
        start: what is asked for.
        where: the source, for errors.

    Raises:
        DataError: when it is asked for and the tokenizer has none.
    """
    if start == "never" or (start == "auto" and not adds_start(tokenizer)):
        return None
    if tokenizer.bos_token_id is None:
        raise DataError(
            "The tokenizer has no start token.", where=where, remedy="leave bos at auto, or set it to never"
        )
    return int(tokenizer.bos_token_id)
