"""Text to token sequences: packed, counted, chosen by a seed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.data.sources import Source
from rankwise.data.start import Start, start_token
from rankwise.errors import DataError

_CHUNK_CHARACTERS = 1 << 18
_MOST_CHARACTERS = 1 << 26
_USUAL_LENGTH = 512


@dataclass(frozen=True)
class Sequences:
    """Token sequences and where they came from.

    Attributes:
        ids: shape `[sequences, tokens]`, int64.
        source: the source, as written.
        available: sequences the source held.
        cut: True when only the first part of a very large source was read.
        bos: the start token that each sequence begins with, beside its text; None for none.
    """

    ids: Tensor
    source: str
    available: int
    cut: bool = False
    bos: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the ids, hence of text, tokenizer, packing and choice together."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _chunks(text: str) -> Iterator[str]:
    """Pieces that end at line ends, so that tokenizing needs little memory and shows no seams inside a line."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + _CHUNK_CHARACTERS)
        if stop < len(text):
            line_end = text.rfind("\n", start, stop)
            stop = line_end + 1 if line_end > start else stop
        yield text[start:stop]
        start = stop


def _stream(source: Source, tokenizer: Any, vocabulary: int) -> tuple[Tensor, bool]:
    """All documents as one stream of ids, each after an end-of-text token where the tokenizer has one."""
    if tokenizer is None:
        raise DataError(
            "The model has no tokenizer, so text cannot be used.", where=str(source), remedy="use a tokens: source"
        )
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    pieces: list[Tensor] = []
    characters, documents, cut = 0, 0, False
    # Whole files are longer than the model's context on purpose; they are cut into windows afterwards.
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for document in source.documents():
            if not document.strip():
                continue
            if documents and separator is not None:
                pieces.append(torch.tensor([separator]))
            documents += 1
            for chunk in _chunks(document):
                pieces.append(torch.tensor(tokenizer(chunk, add_special_tokens=False)["input_ids"], dtype=torch.int64))
            characters += len(document)
            if characters >= _MOST_CHARACTERS:
                cut = True
                break
    finally:
        logger.setLevel(level)
    if not pieces:
        raise DataError("The source holds no text.", where=str(source), remedy="give a source with text in it")
    stream = torch.cat(pieces)
    check_vocabulary(stream, vocabulary, str(source))
    return stream, cut


def check_vocabulary(ids: Tensor, vocabulary: int, where: str) -> None:
    """Raise when an id is not one of a model's vocabulary.

    Raises:
        DataError: naming the id.
    """
    if ids.numel() and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise DataError(
            f"Token id {wrong} is outside the model's vocabulary of {vocabulary}.",
            where=where,
            remedy="the tokenizer (or token file) belongs to another model; use this model's own",
        )


def windows(
    source: Source, tokenizer: Any, vocabulary: int, length: int | None, start: Start = "never"
) -> tuple[Tensor, bool, int | None]:
    """Cut a source into sequences of `length` tokens; the rest that fills none is dropped.

    Args:
        source: where the text is.
        tokenizer: a Hugging Face tokenizer, or None with a `tokens:` source.
        vocabulary: size of the model's vocabulary.
        length: tokens a sequence. None takes a `tokens:` source of shape `[sequences, tokens]` as it is.
        start: whether sequences begin with the tokenizer's start token, which is one of the `length`. Ready-made
            tokens are taken as they are.

    Returns:
        Ids of shape `[sequences, length]`, whether the source was too large to be read whole, and the start token.

    Raises:
        DataError: when the source is empty, shorter than one sequence, or of another vocabulary.
    """
    cut, bos = False, None
    if source.kind == "tokens":
        if start == "always":
            raise DataError(
                "Ready-made tokens are taken as they are, and a start token is asked for.",
                where=str(source),
                remedy="put the start token into the file, or leave bos at auto",
            )
        stream = source.token_ids()
        check_vocabulary(stream, vocabulary, str(source))
        if stream.ndim == 2 and length in (None, stream.shape[1]):
            if not stream.numel():
                raise DataError(
                    "The source holds no sequence.", where=str(source), remedy="give a source with tokens in it"
                )
            return stream, cut, bos
        stream = stream.flatten()
    else:
        stream, cut = _stream(source, tokenizer, vocabulary)
        bos = start_token(tokenizer, start, str(source))
    length = length or _USUAL_LENGTH
    text = length if bos is None else length - 1
    if not 1 <= text <= len(stream):
        raise DataError(
            f"The source has {len(stream)} tokens, fewer than one sequence of {length}.",
            where=str(source),
            remedy="give more text, or a smaller length",
        )
    rows = stream[: len(stream) // text * text].view(-1, text)
    if bos is not None:
        check_vocabulary(torch.tensor([bos]), vocabulary, str(source))
        rows = torch.cat((torch.full((len(rows), 1), bos), rows), dim=1)
    return rows, cut, bos


def choose(ids: Tensor, count: int | None, seed: int | None, first: int = 0) -> Tensor:
    """Pick sequences.

    Args:
        ids: shape `[sequences, tokens]`.
        count: how many; None for all.
        seed: draw without replacement, kept in their order; None takes the first `count`.
        first: sequences skipped at the start.
    """
    ids = ids[first:]
    if count is None or count >= len(ids):
        return ids
    if seed is None:
        return ids[:count]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return ids[order.sort().values]


def spread_first(ids: Tensor, count: int) -> Tensor:
    """The same sequences, so many that lie evenly over all of them first; else their order stays.

    Args:
        ids: shape `[sequences, tokens]`.
        count: how many come first.
    """
    first = torch.arange(count) * len(ids) // max(1, count)
    rest = torch.ones(len(ids), dtype=torch.bool)
    rest[first] = False
    return torch.cat([ids[first], ids[rest]])


def load_sequences(
    source: Source,
    tokenizer: Any,
    vocabulary: int,
    *,
    length: int | None,
    count: int | None,
    seed: int | None,
    first: int = 0,
    start: Start = "never",
) -> Sequences:
    """Read, cut and choose. Arguments and errors as for `windows` and `choose`.

    Raises:
        DataError: also when `first` skips everything.
    """
    ids, cut, bos = windows(source, tokenizer, vocabulary, length, start)
    chosen = choose(ids, count, seed, first)
    if not len(chosen):
        raise DataError(
            f"The source has {len(ids)} sequences and {first} are skipped.", where=str(source), remedy="skip fewer"
        )
    return Sequences(chosen, str(source), len(ids) - first, cut, bos)
