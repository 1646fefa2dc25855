"""Instruction data in Alpaca's form.

A line is a JSON object with `instruction`, `output` and perhaps `input`; or, as in Alpaca's seed tasks, `instruction`
and `instances`, a list of objects with `input` and `output`. `PROMPT` is what the model reads before the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rankwise.data.lines import json_lines, known_keys
from rankwise.errors import DataError

PROMPT = "### Instruction:\n{instruction}\n\n{given}### Response:\n"
GIVEN = "### Input:\n{input}\n\n"


def prompt_of(record: dict[str, str]) -> str:
    """The text before the output."""
    given = GIVEN.format(input=record["input"]) if record["input"].strip() else ""
    return PROMPT.format(instruction=record["instruction"], given=given)


def read_instructions(path: Path) -> Iterator[dict[str, str]]:
    """Records with `instruction`, `input` and `output`, in order.

    Raises:
        DataError: when there is no such file; naming the first line that is not of the form.
    """
    for where, row in json_lines(path):
        instances = row.get("instances", [row])
        if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
            raise DataError("A line's 'instances' is no list of objects.", where=where, remedy="see the docs")
        for instance in instances:
            record = {"input": "", **row, **instance}
            for field in ("instruction", "input", "output"):
                if not isinstance(record.get(field), str):
                    raise DataError(
                        f"A line has no text field {field!r}.",
                        where=where,
                        remedy=f"this line has: {known_keys(record)}; Alpaca's form is instruction, "
                        "input (may be left out), output",
                    )
            yield {field: record[field] for field in ("instruction", "input", "output")}
