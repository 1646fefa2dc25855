"""Texts that published perplexities are of, by the names that papers give them.

Each is one file on the Hugging Face hub at a revision that is written down here, joined to one document the way GPTQ,
SparseGPT and those after them join it, so that the same windows are scored.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rankwise.data.columns import parquet_column
from rankwise.errors import DataError
from rankwise.reading import one_line, parse_json


@dataclass(frozen=True)
class NamedText:
    """Where a text is and how its rows become one document.

    Attributes:
        repository: data set on the hub.
        revision: commit; a branch where the repository is a conversion without commits of its own.
        file: in the repository.
        field: the field that holds the text.
        joint: what stands between rows.
        rows: how many are read; None for all.
    """

    repository: str
    revision: str
    file: str
    field: str
    joint: str
    rows: int | None = None


NAMED_TEXTS = {
    "wikitext2": NamedText(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "text",
        "\n\n",
    ),
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only", "refs/convert/parquet", "penn_treebank/test/0000.parquet", "sentence", " "
    ),
    "c4": NamedText(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "en/c4-validation.00000-of-00008.json.gz",
        "text",
        " ",
        1100,
    ),
}
"""Test splits of WikiText-2 (raw) and Penn Treebank, and the first 1,100 documents of C4's validation split."""


def named_document(name: str) -> Iterator[str]:
    """The document of one of `NAMED_TEXTS`.

    Args:
        name: a key of it.

    Raises:
        DataError: when it cannot be had; it says what to give instead.
    """
    from huggingface_hub import hf_hub_download

    text = NAMED_TEXTS[name]
    try:
        path = hf_hub_download(text.repository, text.file, repo_type="dataset", revision=text.revision)
    # No network, no such file, no permission: each is another class of another library.
    except Exception as problem:
        raise DataError(
            f"{name} cannot be had from the hub ({type(problem).__name__}: {one_line(problem)[:160]}).",
            where=f"{text.repository}, {text.file} at {text.revision}",
            remedy="without a network give the text as a file: text:FILE, jsonl:FILE#field or parquet:FILE#field",
        ) from None
    yield text.joint.join(islice(_rows(Path(path), text.field), text.rows))


def _rows(path: Path, field: str) -> Iterator[str]:
    """Texts of a parquet file, or of JSON lines that are packed."""
    if path.suffix == ".parquet":
        yield from parquet_column(str(path), field)
        return
    with gzip.open(path, "rb") as lines:
        for line in lines:
            yield parse_json(line)[field]
