"""What lies in a checkpoint beside its weights: tokenizer, generation settings, and what prepares images for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

from rankwise.checkpoints.origin import copy_licences
from rankwise.checkpoints.verify import read_json
from rankwise.models import reads_images

_PROCESSOR = "processor_config.json"
_TEMPLATE = "chat_template.jinja"
_FILES = (
    _PROCESSOR,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "chat_template.json",
    _TEMPLATE,
)
"""What transformers reads a processor from, beside the tokenizer."""


def write_companions(loaded: Any, folder: Path, kind: str) -> None:
    """Write the tokenizer, the licence and, of a model that reads images, what its processor is made of.

    Args:
        loaded: the model, its tokenizer, and where they came from.
        folder: of the checkpoint.
        kind: the original's model type, to which transformers knows a processor where no file names one.
    """
    found = _processor_files(loaded) if reads_images(loaded.model) else {}
    if loaded.tokenizer is not None:
        # A template of its own stays where the source has it: beside that of a processor it would be taken for it.
        options = {"save_jinja_files": _TEMPLATE in found} if found else {}
        loaded.tokenizer.save_pretrained(folder, **options)
    for name, file in found.items():
        shutil.copyfile(file, folder / name)
    copy_licences(loaded.source, folder)
    if found and not any(_names_a_class(folder / name) for name in (*_FILES[:4], "tokenizer_config.json")):
        known = PROCESSOR_MAPPING_NAMES.get(kind)
        if known is not None:
            given = read_json(folder / _PROCESSOR) if (folder / _PROCESSOR).exists() else {}
            (folder / _PROCESSOR).write_text(json.dumps({**given, "processor_class": known}, indent=2) + "\n")


def missing_processor(loaded: Any) -> str:
    """What to say of a model that reads images and whose source holds nothing to prepare them with; empty otherwise.

    Raises:
        ModelError: naming a file of the processor that cannot be read.
    """
    if not reads_images(loaded.model):
        return ""
    found = _processor_files(loaded)
    for name, path in found.items():
        if name.endswith(".json"):
            read_json(Path(path))
    if any("processor" in name for name in found):
        return ""
    return "the source holds no processor (preprocessor_config.json): the checkpoint has none either"


def _processor_files(loaded: Any) -> dict[str, str]:
    """Paths of the files that there are, by name."""
    quiet: Any = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    found = {name: cached_file(loaded.source, name, **quiet) for name in _FILES}
    return {name: path for name, path in found.items() if path is not None}


def _names_a_class(file: Path) -> bool:
    if not file.exists():
        return False
    values = read_json(file)
    return "processor_class" in values or "AutoProcessor" in values.get("auto_map", {})
