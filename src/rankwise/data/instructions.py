"""Examples to train on: instructions in Alpaca's form, or any other source, packed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.data.alpaca import prompt_of, read_instructions
from rankwise.data.sequences import check_vocabulary, choose, windows
from rankwise.data.sources import Source
from rankwise.data.start import Start, start_token
from rankwise.errors import DataError

IGNORED = -100
"""The label of a token that is not learned from."""


@dataclass(frozen=True)
class Examples:
    """Token sequences with labels; equal lengths for plain text, each its own for instructions.

    Attributes:
        ids: by example, shape `[tokens]`, int64.
        labels: the same, with `IGNORED` where nothing is learned.
        source: as written.
        shortened: examples longer than the length allowed, of which the end was cut.
    """

    ids: list[Tensor]
    labels: list[Tensor]
    source: str
    shortened: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens that are learned from."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    @property
    def fingerprint(self) -> str:
        """Hash of ids and labels."""
        digest = hashlib.sha256()
        for each in (*self.ids, *self.labels):
            digest.update(repr(len(each)).encode() + each.numpy().tobytes())
        return digest.hexdigest()


def _instruction_examples(
    source: Source, tokenizer: Any, vocabulary: int, length: int, output_only: bool, start: Start
) -> Examples:
    if tokenizer is None:
        raise DataError(
            "The model has no tokenizer, so text cannot be used.", where=str(source), remedy="use a tokens: source"
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos = start_token(tokenizer, start, str(source))
    begin = [] if bos is None else [bos]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    all_ids, all_labels, shortened = [], [], 0
    for record in read_instructions(Path(source.target)):
        prompt, output = begin + encode(prompt_of(record)), encode(record["output"]) + end
        ids = prompt + output
        labels = ([IGNORED] * len(prompt) if output_only else prompt) + output
        shortened += len(ids) > length
        ids, labels = ids[:length], labels[:length]
        # The first token is predicted from nothing; an example whose output was cut away teaches nothing.
        if any(label != IGNORED for label in labels[1:]):
            all_ids.append(torch.tensor(ids))
            check_vocabulary(all_ids[-1], vocabulary, str(source))
            all_labels.append(torch.tensor(labels))
    if not all_ids:
        raise DataError("The source holds no example to learn from.", where=str(source), remedy="give more data")
    return Examples(all_ids, all_labels, str(source), shortened)


def load_examples(
    source: Source,
    tokenizer: Any,
    vocabulary: int,
    *,
    length: int,
    count: int | None = None,
    seed: int | None = None,
    output_only: bool = False,
    start: Start = "auto",
) -> Examples:
    """Examples from instructions (`alpaca:`) or from any other source, packed.

    Args:
        source: where they are.
        tokenizer: the model's.
        vocabulary: size of the model's vocabulary.
        length: most tokens an example.
        count: how many; None for all.
        seed: draws `count` of them; None takes the first.
        output_only: learn from the output alone; for instructions.
        start: whether examples begin with the tokenizer's start token.

    Raises:
        DataError: naming the first bad line, or when there is nothing to learn from.
    """
    if source.kind == "alpaca":
        found = _instruction_examples(source, tokenizer, vocabulary, length, output_only, start)
        if count is not None and count < len(found):
            order = choose(torch.arange(len(found)), count, seed).tolist()
            ids, labels = [found.ids[i] for i in order], [found.labels[i] for i in order]
            return Examples(ids, labels, found.source, found.shortened)
        return found
    if output_only:
        raise DataError(
            "Plain text has no outputs to learn from alone.", where=str(source), remedy="use alpaca:FILE.jsonl"
        )
    ready_made = source.kind == "tokens"
    packed, _, _ = windows(source, tokenizer, vocabulary, None if ready_made else length, start)
    shortened = len(packed) if packed.shape[1] > length else 0
    rows = list(choose(packed[:, :length], count, seed))
    return Examples(rows, rows, str(source), shortened)
