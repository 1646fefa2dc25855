"""Four small multiple-choice tasks made from a text at hand, for machines without a network.

They are no substitute for the tasks of papers; what they share with those is that a choice is right or wrong, so that
they show losses that perplexity averages away. Each example offers four choices, of which the model
takes the one that it finds most likely.

local_next_sentence   the sentence that follows, or one from elsewhere in the text
local_cloze           the last word of a sentence, or the last word of another
local_order           three sentences in their order, or in another
local_arithmetic      sum, difference or product of small numbers, or a number near it; needs no text
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rankwise.errors import DataError

Example = dict[str, Any]
"""`context`, `choices` (four, as they continue the context) and `answer`, which of them is right."""

CHOICES = 4

_MOST_CHARACTERS = 1 << 22
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_SENTENCE_LENGTHS = range(30, 260)
_LAST_WORD = re.compile(r"^(.{20,} )([a-z]{4,})( ?[.!?])$")


def sentences_of(documents: Iterable[str]) -> list[list[str]]:
    """Runs of sentences that follow one another, paragraph by paragraph; short and long ones end a run."""
    runs: list[list[str]] = []
    read = 0
    for document in documents:
        for paragraph in re.split(r"\n\s*\n|\n(?= =)", document[: _MOST_CHARACTERS - read]):
            run: list[str] = []
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if len(sentence) in _SENTENCE_LENGTHS and sentence[-1:] in ".!?":
                    run.append(sentence)
                else:
                    runs.append(run)
                    run = []
            runs.append(run)
        read += len(document)
        if read >= _MOST_CHARACTERS:
            break
    return [run for run in runs if run]


def _shuffled(context: str, right: str, wrong: Sequence[str], draw: random.Random) -> Example:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def _next_sentence(runs: Sequence[Sequence[str]], count: int, draw: random.Random) -> list[Example]:
    places = [(run, i) for run in runs for i in range(2, len(run))]
    everywhere = [sentence for run in runs for sentence in run]
    found = []
    for run, i in draw.sample(places, min(count, len(places))):
        others = [sentence for sentence in draw.sample(everywhere, min(16, len(everywhere))) if sentence not in run]
        if len(set(others)) >= CHOICES - 1:
            wrong = [" " + sentence for sentence in list(dict.fromkeys(others))[: CHOICES - 1]]
            found.append(_shuffled(" ".join(run[i - 2 : i]), " " + run[i], wrong, draw))
    return found


def _cloze(runs: Sequence[Sequence[str]], count: int, draw: random.Random) -> list[Example]:
    matches = [match for run in runs for sentence in run if (match := _LAST_WORD.match(sentence))]
    words = sorted({match[2] for match in matches})
    found = []
    for match in draw.sample(matches, min(count, len(matches))):
        others = [word for word in draw.sample(words, min(CHOICES, len(words))) if word != match[2]]
        if len(others) >= CHOICES - 1:
            wrong = [" " + word for word in others[: CHOICES - 1]]
            found.append(_shuffled(match[1].rstrip(), " " + match[2], wrong, draw))
    return found


def _order(runs: Sequence[Sequence[str]], count: int, draw: random.Random) -> list[Example]:
    orders = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    places = [(run, i) for run in runs for i in range(1, len(run) - 2)]
    found = []
    for run, i in draw.sample(places, min(count, len(places))):
        three = run[i : i + 3]
        if len(set(three)) == len(three):
            wrong = [" " + " ".join(three[k] for k in order) for order in draw.sample(orders, CHOICES - 1)]
            found.append(_shuffled(run[i - 1], " " + " ".join(three), wrong, draw))
    return found


def _arithmetic(_runs: Sequence[Sequence[str]], count: int, draw: random.Random) -> list[Example]:
    found = []
    for _ in range(count):
        sign = draw.choice("+-*")
        a, b = (draw.randint(2, 9), draw.randint(2, 9)) if sign == "*" else (draw.randint(2, 49), draw.randint(2, 49))
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        right = {"+": a + b, "-": a - b, "*": a * b}[sign]
        near = [right + step for step in (-11, -10, -2, -1, 1, 2, 10, 11) if right + step >= 0]
        shown = "2 + 2 = 4\n9 - 4 = 5\n3 * 2 = 6\n"
        wrong = [f" {number}" for number in draw.sample(near, CHOICES - 1)]
        found.append(_shuffled(f"{shown}{a} {sign} {b} =", f" {right}", wrong, draw))
    return found


_MAKERS: dict[str, Callable[[Sequence[Sequence[str]], int, random.Random], list[Example]]] = {
    "local_next_sentence": _next_sentence,
    "local_cloze": _cloze,
    "local_order": _order,
    "local_arithmetic": _arithmetic,
}

LOCAL_TASKS = tuple(_MAKERS)
"""Names of the tasks that need no network."""


def make_examples(task: str, documents: Iterable[str], source: str, count: int = 200, seed: int = 0) -> list[Example]:
    """Examples of one of `LOCAL_TASKS`, the same for the same text and seed.

    Args:
        task: which.
        documents: of the text.
        source: what the text is called, for errors.
        count: examples at most; fewer where the text holds fewer.
        seed: for places and choices.

    Raises:
        DataError: when the text holds none.
    """
    runs = [] if task == "local_arithmetic" else sentences_of(documents)
    # Seeding by a string is by its hash under SHA-512, the same in every process.
    found = _MAKERS[task](runs, count, random.Random(f"{task} {seed}"))
    if not found:
        raise DataError(
            f"The text holds no example for {task}.",
            where=source,
            remedy="give --task-text a text of whole sentences in paragraphs",
        )
    return found
