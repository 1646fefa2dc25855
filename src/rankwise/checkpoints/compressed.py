"""Checkpoints that rankwise wrote. From the hub they are fetched whole: they load as from a directory, and run no code
of theirs."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from rankwise.checkpoints.gguf import is_gguf
from rankwise.checkpoints.verify import read_json
from rankwise.errors import ModelError
from rankwise.layers.needs import unmet
from rankwise.reading import one_line

CHECKPOINT_KEY = "rankwise"
"""The key in a config under which a compressed checkpoint describes its layers."""

CONFIG = "config.json"


def is_compressed(source: str) -> bool:
    """Whether a local directory holds a checkpoint with low-rank layers that rankwise wrote."""
    config = Path(source) / CONFIG
    return config.is_file() and isinstance(read_json(config).get(CHECKPOINT_KEY), dict)


def require_known_format(source: str) -> None:
    """Raise when a compressed checkpoint is in a form that this version does not know, or needs more than there is.

    Raises:
        ModelError: naming the format, or what is missing.
    """
    config = Path(source) / CONFIG
    if problem := unmet(read_json(config)[CHECKPOINT_KEY]):
        raise ModelError(
            problem,
            where=str(config),
            remedy="use the version of rankwise that wrote it, or a newer one, and the transformers it needs",
        )


def unreadable(source: str, problem: Exception) -> ModelError:
    """What to say of a model on the hub that cannot be read."""
    return ModelError(
        f"The model cannot be read from the hub ({one_line(problem)[:200]}).",
        where=source,
        remedy="check the name; without a network give a local directory",
    )


def fetched(source: str, *, weights: bool = True) -> str:
    """The directory of a compressed checkpoint that is named by its place on the hub; any other source as it is.

    Args:
        source: directory or hub name.
        weights: whether all of it is needed; else its config alone.

    Raises:
        ModelError: when the hub does not answer, or it is one of ours and cannot be downloaded.
    """
    # A name that no file can have is no error here.
    if os.path.exists(source) or is_gguf(source) or source.count("/") > 1 or source.startswith((".", "/", "~")):
        return source
    try:
        config = Path(hf_hub_download(source, CONFIG))
    except LocalEntryNotFoundError as problem:
        raise unreadable(source, problem) from None
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        # What is wrong is said where the model is loaded.
        return source
    # A hub that does not answer has been waited for, and is not asked again.
    except Exception as problem:
        raise unreadable(source, problem) from None
    if not is_compressed(str(config.parent)):
        return source
    if not weights:
        return str(config.parent)
    try:
        return snapshot_download(source)
    except Exception as problem:
        raise ModelError(
            f"The checkpoint cannot be downloaded ({type(problem).__name__}: {one_line(problem)[:200]}).",
            where=source,
            remedy="the same command goes on where it stopped; without a network give a local directory",
        ) from None
