"""What a checkpoint carries over of where its model came from: the base model's name, its licence and its language."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rankwise.reading import UnreadableError, parse_yaml, read_text

_CARD = "README.md"
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_KEPT = ("license", "license_name", "license_link", "language")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_QUIET: Any = {
    f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
}


def front_matter(source: str) -> dict[str, Any]:
    """The keys of a source's model card that its compressed form keeps, and `base_model` where it is known.

    Args:
        source: directory or hub name. A card that is not there or cannot be read says nothing.
    """
    if Path(source).is_file():
        return {}
    given = _of_card(source)
    found = {key: given[key] for key in _KEPT if _plain(given.get(key))}
    local = Path(source).expanduser().exists()
    base = given.get("base_model") if local else source
    names = base if isinstance(base, list) else [base]
    if all(isinstance(each, str) and _HUB_NAME.fullmatch(each) for each in names):
        found["base_model"] = base
    return found


def copy_licences(source: str, folder: Path) -> None:
    """Copy the files of a source that say on which terms it may be passed on.

    Args:
        source: directory or hub name.
        folder: of the checkpoint.
    """
    for name in () if Path(source).is_file() else _LICENCES:
        if (file := cached_file(source, name, **_QUIET)) is not None:
            shutil.copyfile(file, folder / name)


def _plain(value: Any) -> bool:
    """Whether a value is a short word, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and 0 < len(each) <= 200 for each in values)


def _of_card(source: str) -> dict[str, Any]:
    file = cached_file(source, _CARD, **_QUIET)
    if file is None:
        return {}
    try:
        found = _FRONT.match(read_text(file))
        values = parse_yaml(found.group(1)) if found else {}
    except UnreadableError:
        return {}
    return values if isinstance(values, dict) else {}
