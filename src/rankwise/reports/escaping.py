"""Text of others (names of models, files, layers) where Markdown, a picture or a terminal would read signs into it."""

from __future__ import annotations

import re

from rich.text import Text

_SIGNS = re.compile(r"[\\`*\[\]<>|~&#!$]|(?<![^\W_])_|_(?![^\W_])")
_FENCE = re.compile(r"`+")


def printable(text: object) -> str:
    """On one line, without control characters, which a terminal would obey."""
    joined = " ".join(str(text).split())
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in joined)
    return shown.encode("utf-8", "replace").decode()


def cell(text: object) -> Text:
    """A cell or a heading of a table on the terminal, no markup in it."""
    return Text(printable(text))


def in_markdown(text: object) -> str:
    """Text for Markdown that is shown as it is: no link, no emphasis, no HTML, no cell of a table."""
    escaped = _SIGNS.sub(lambda sign: "\\" + sign[0], printable(text))
    # What would begin a list, a heading or a rule at the start of a line.
    escaped = re.sub(r"^([-+=:])", r"\\\1", escaped)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", escaped)


def in_code(text: object) -> str:
    """Text for Markdown in letters of code, whatever is in it; a pipe is written as the sign that looks like it."""
    shown = printable(text).replace("|", "\N{BROKEN BAR}")
    if not shown:
        return "`(nothing)`"
    fence = "`" * (1 + max((len(run) for run in _FENCE.findall(shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def in_picture(text: object, most: int = 30) -> str:
    """Text for a picture, in which a dollar begins no formula."""
    shown = printable(text)
    shown = shown if len(shown) <= most else shown[: most - 3] + "..."
    return shown.replace("$", r"\$")
