"""What docs/choosing.md says of each goal is what was measured."""

from __future__ import annotations

import re

from conftest import ROOT, figures

LINES = {
    "As small as possible": [("quantize", 4.0), ("quantize", 3.0)],
    "No codes": [("two_sided", 0.9), ("two_sided", 0.8)],
    "A plain checkpoint": [("flap", 0.8)],
}
"""Beginning of a line -> the rows of the comparison that it tells of, in order."""


def test_goals_tell_what_was_measured() -> None:
    page = (ROOT / "docs/choosing.md").read_text()
    names = ("perplexity/wikitext2.test", "bytes")
    dense = {name: figures("compare", name, way="dense")[0] for name in names}
    for start, rows in LINES.items():
        line = page[page.index(f"**{start}") :].split("\n- ")[0]
        said = [(float(a), int(b)) for a, b in re.findall(r"(\d\.\d\d) times\s+at\s+(\d+)%", line)]
        found = []
        for way, asked in rows:
            score, size = (figures("compare", name, way=way, asked=asked)[0] / dense[name] for name in names)
            found.append((round(score, 2), round(100 * size)))
        assert said == found
