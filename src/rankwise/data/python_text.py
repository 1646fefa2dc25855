"""Text that every CPython carries: the help topics of `pydoc` and the docstrings of the standard library.

The bundled model learns from it and the `bundled` data source reads it, so a newcomer needs no download. Documents are
assigned to a split by a hash of their name, which keeps a document on the same side under every Python version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "heldout")
_HELDOUT_EVERY = 8
_SHORTEST = 200
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
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "")
                yield f"{name}: {text}" if name else text


def _modules(split: str) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_PACKAGES or part.startswith(("__phello", "config-")) for part in parts):
            continue
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


def documents(split: str) -> Iterator[str]:
    """Yield the documents of one split, in a fixed order.

    Args:
        split: `train` or `heldout`.

    Raises:
        ValueError: when `split` is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    seen: set[str] = set()
    for source in (_topics(split), _modules(split)):
        for text in source:
            if len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                yield text
