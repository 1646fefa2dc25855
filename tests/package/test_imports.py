"""No file of the package imports itself over others: not in a function, not for types alone, not over an `__init__`.

`lint-imports` holds the order of the packages. This holds the files, among which a package's `__init__` is one more.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import grimp
import pytest

Import = tuple[str, str]

KNOWN: set[Import] = set()
"""Imports (by, of) that close a circle and are still to go. One that closes none any more has to leave this set."""


def graph_of(package: str, without: Set[Import] = frozenset()) -> grimp.ImportGraph:
    """Files and what they import, and of what they import every `__init__` that runs on the way."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    for by, of in without:
        graph.remove_import(importer=by, imported=of)
    for by in graph.modules:
        for of in graph.find_modules_directly_imported_by(by):
            parent = of.rpartition(".")[0]
            while parent and not f"{by}.".startswith(f"{parent}."):
                graph.add_import(importer=by, imported=parent)
                parent = parent.rpartition(".")[0]
    return graph


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Sets of files of which every one imports, over others, itself."""
    found: set[tuple[str, ...]] = set()
    for module in graph.modules:
        circle = graph.find_upstream_modules(module) & graph.find_downstream_modules(module) | {module}
        if len(circle) > 1:
            found.add(tuple(sorted(circle)))
    return [list(circle) for circle in sorted(found)]


def lines_of(graph: grimp.ImportGraph, circle: list[str]) -> str:
    """The imports within a circle."""
    return "\n".join(
        f"{by} imports {of}" + "".join(f", line {line['line_number']}: {line['line_contents']}" for line in lines)
        for by in circle
        for of in sorted(graph.find_modules_directly_imported_by(by) & set(circle))
        for lines in [graph.get_import_details(importer=by, imported=of)]
    )


def test_no_file_imports_itself_over_others() -> None:
    graph = graph_of("rankwise", without=KNOWN)
    found = circles(graph)
    assert not found, "\n\n".join(["import circles:", *(lines_of(graph, circle) for circle in found)])


def test_every_known_circle_is_still_there() -> None:
    for known in KNOWN:
        found = circles(graph_of("rankwise", without=KNOWN - {known}))
        assert any(set(known) <= set(circle) for circle in found), f"{known} closes no circle: take it out of KNOWN"


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from made_up.b import B", "b": "from made_up.c import C", "c": ""}, ""),
        ({"a": "from made_up.b import B", "b": "if TYPE_CHECKING:\n    from made_up.a import A"}, "a b"),
        ({"a": "def f():\n    from made_up.b import B", "b": "import made_up.a"}, "a b"),
        ({"a": "from made_up.b import B", "b": "from made_up.c import C", "c": "from made_up import a"}, "a b c"),
        ({"p/__init__": "from made_up.p.a import A", "p/a": "from made_up.p import B", "p/b": ""}, "p p.a"),
        ({"p/__init__": "from made_up.a import A", "p/b": "", "a": "from made_up.p.b import B"}, "a p"),
        ({"p/__init__": "from made_up.p.a import A", "p/a": "from made_up.p import b", "p/b": ""}, ""),
    ],
    ids=["none", "types alone", "in a function", "three files", "own package", "another's __init__", "a sibling"],
)
def test_a_circle_is_found_however_it_is_imported(
    files: dict[str, str], circle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / "made_up" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from typing import TYPE_CHECKING\n" + text)
    monkeypatch.syspath_prepend(tmp_path)
    graph = graph_of("made_up")
    found = circles(graph)
    assert found == ([[f"made_up.{name}" for name in circle.split()]] if circle else [])
    assert all(name in lines_of(graph, each) for each in found for name in each)
