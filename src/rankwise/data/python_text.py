"""Text that every CPython carries: the help topics of `pydoc` and the docstrings of the standard library.

The bundled model learns from it and the `bundled` data source reads it, so a newcomer needs no download. Documents are
assigned to a split by a hash of their name, which keeps a document on the same side under every Python version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SPLITS = ("train", "heldout")
_HELDOUT_EVERY = 8
_SHORTEST = 200
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_SKIPPED_PACKAGES = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip", "config"}
)


def _split_of(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % _HELDOUT_EVERY == 0 else "train"


def _topics(split: str) -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if _split_of(f"topic {name}") == split:
            yield topics[name].strip()


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings, outer ones first. Expressions, of which a tree has most, hold none and are not gone through."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        nodes.extend(each for each in ast.iter_child_nodes(node) if isinstance(each, _STATEMENTS))
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "")
                yield f"{name}: {text}" if name else text


def _files(root: Path) -> Iterator[Path]:
    """Python files below a folder, but for those of packages that are skipped; links to folders are not followed."""

    def skipped(name: str) -> bool:
        return name in _SKIPPED_PACKAGES or name.startswith(("__phello", "config-"))

    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if not skipped(name)]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and not skipped(name))


def _modules(split: str) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_files(root)):
        parts = path.relative_to(root).parts
        # The package, not the file, decides the split: modules of one package share sentences.
        if _split_of(f"package {parts[0].removesuffix('.py')}") != split:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        yield "\n\n".join(_docstrings(tree))


@cache
def documents(split: str) -> tuple[str, ...]:
    """The documents of one split, in a fixed order; read once a process, some ten megabytes.

    Args:
        split: `train` or `heldout`.

    Raises:
        ValueError: when `split` is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    texts = (text for source in (_topics(split), _modules(split)) for text in source)
    return tuple(dict.fromkeys(text for text in texts if len(text) >= _SHORTEST))
