"""Pages: what they hold, that they need nothing else, and how a browser takes them at two widths, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import Run
from rankwise import compress
from rankwise.checkpoints import FILES_FILE, REPORT_FILE
from rankwise.recipes import recipe_from
from rankwise.reports import ComparedModels, ComparedRow, Machine, Report, Settings
from rankwise.reports.charts import line_chart
from rankwise.reports.comparison_page import comparison_page
from rankwise.reports.report_page import report_page
from rankwise.sizes import Plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '<script>alert(1)</script> & "quotes" {{ 1 }}'


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, _tiny_source: Path) -> Path:
    """A compression with a search and a repair, whose page has every chart."""
    folder = tmp_path_factory.mktemp("page")
    text = {"source": "bundled", "sequences": 4, "length": 32}
    recipe = {
        "model": str(_tiny_source),
        "output": str(folder / "out"),
        "allocation": {"name": "bayesian", "space": "spectral", "trials": 3},
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "calibration": text,
        "validation": {"source": "bundled:heldout", "sequences": 2, "length": 32},
        "repair": {"steps": ["factors"]},
        "evaluation": {"source": "bundled:heldout", "sequences": 2, "length": 32, "speed": False},
    }
    compress(recipe_from(recipe), run_directory=folder / "run")
    points = [
        {"kind": "role", "role": role, "block": None, "keep": k, "kept": k, "perplexity": 9 + k}
        for role in ("q", "up")
        for k in (0.3, 0.6)
    ]
    points += [{"kind": "site", "role": "q", "block": 0, "keep": 0.5, "kept": 0.5, "perplexity": 9.5}]
    known = {"dense_perplexity": 8.0, "points": points}
    (folder / "out/sensitivity.json").write_text(json.dumps(known))
    return folder / "out"


class _Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.scripts = self.charts = self.described = self.tables = 0
        self._in: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._in = tag
        self.scripts += tag == "script"
        self.charts += tag == "svg"
        self.described += tag == "svg" and given.get("role") == "img" and bool(given.get("aria-label"))
        self.tables += tag == "table"
        self.fetched += [value for key, value in attrs if key in ("src", "href") and value and value != "data:,"]

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self.headings.append(data.strip())
            self._in = None


def outline(page: str) -> _Outline:
    found = _Outline()
    found.feed(page)
    return found


def test_a_report_holds_every_part_and_fetches_nothing(result: Path, rankwise: Run, tiny: Path, tmp_path: Path) -> None:
    assert "report.html" in json.loads((result / FILES_FILE).read_text())
    prompts = tmp_path / "prompts"
    prompts.write_text("Return <b>\n")
    before = (result / "report.html").read_text()
    status, out, error = rankwise("report", result, "--against", tiny, "--prompts", prompts, "--new-tokens", "3")
    assert status == 0, error
    assert "report.html" in out
    page = (result / "report.html").read_text()
    assert page != before
    found = outline(page)
    assert [h for h in found.headings if h] == [
        "Before and after",
        "What to try next",
        "The plan",
        "Where the loss sits",
        "Spectra",
        "How it got there",
        "Repair",
        "Sensitivity",
        "Time and memory",
        "What is said",
        *(["Notes of the run"] if "Notes of the run" in page else []),
        "To repeat it",
    ]
    # Search, repair, spectra, sensitivity: each described, each with its numbers.
    assert found.charts == found.described == 4
    assert page.count("<summary>the numbers</summary>") == 4
    assert found.fetched == []
    assert found.scripts == 0
    assert "Return &lt;b&gt;" in page
    report = Report.load(result / "rankwise_report.json")
    for figure in (f"{report.after.parameters:,}", f"{report.keep.got:.4f}", report.machine.torch or ""):
        assert figure in page
    # The recipe on the page is a recipe.
    import yaml

    recipe = html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.S)[-1])
    assert recipe_from(yaml.safe_load(recipe)).model_dump(mode="json") == report.recipe.model_dump(mode="json")
    # The page is ours: the directory may still be replaced.
    assert json.loads((result / FILES_FILE).read_text())["report.html"] == (result / "report.html").stat().st_size


def compared() -> ComparedModels:
    rows = [ComparedRow(key="d", way="dense", perplexity={HOSTILE: 10.0}, generations={HOSTILE: HOSTILE})]
    for number in range(10):
        for size in (0.8, 0.5):
            way = f"{HOSTILE} {number}"
            rows.append(ComparedRow(key="k", way=way, asked=size, perplexity={HOSTILE: 11.0 + number / size}))
    rows.append(ComparedRow(key="p", way="svd", asked=0.5, problem=HOSTILE))
    return ComparedModels(
        recipe=Settings(model=HOSTILE, spelling="keep"),  # type: ignore[call-arg]
        model_fingerprint="f",
        architecture="LlamaForCausalLM",
        rows=tuple(rows),
        machine=Machine(device="CPU", rankwise="0"),
    )


@pytest.mark.parametrize("gpu_bytes", [None, 3_000_000_000])
def test_what_a_gpu_held_is_a_column_where_there_was_one(gpu_bytes: int | None, result: Path) -> None:
    report, plan = Report.load(result / REPORT_FILE), Plan.load(result / "plan.json")
    stages = {name: replace(stage, gpu_bytes=gpu_bytes) for name, stage in report.stages.items()}
    page = report_page(report.model_copy(update={"stages": stages}), plan)
    assert ("of the GPU" in page) == ("3.00 GB" in page) == (gpu_bytes is not None)


def test_a_comparison_shows_text_of_others_as_it_is() -> None:
    page = comparison_page(compared())
    found = outline(page)
    assert found.scripts == 0
    assert found.fetched == []
    assert html.escape("<script>alert(1)</script>") in page
    assert page.count("<polyline") == 10
    assert "no plan" in page


def test_a_report_that_is_not_there_is_said(rankwise: Run, tiny: Path) -> None:
    for options, says in (([], "holds no report"), (["--against", str(tiny)], "--prompts")):
        status, _, error = rankwise("report", tiny, *options)
        assert status == 2
        assert says in error


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_puts_points_where_they_belong(log: bool) -> None:
    chart = line_chart("t", {"a": [(0, 1), (1, 10), (2, 100)]}, "x", "y", log=log, level=("dense", 1.0))
    (line,) = re.findall(r'<polyline class="line c0" points="([^"]+)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, each.split(","))) for each in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1)
    share = (y0 - y1) / (y0 - y2)
    assert share == pytest.approx(0.5 if log else 9 / 99, abs=1e-3)
    # A single point and a flat line have a place too.
    assert "nan" not in line_chart("t", {"a": [(1, 5)]}, "x", "y", log=log)
    assert line_chart("t", {}, "x", "y") == ""


_LOOK = """
<body style="margin:0"><iframe id="f" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const d = document.getElementById("f").contentDocument, e = d.documentElement;
  const ink = f => getComputedStyle(f).color, back = getComputedStyle(d.body).backgroundColor;
  document.title = JSON.stringify({{over: e.scrollWidth - {width}, ink: ink(d.body), back: back,
    heights: [...d.querySelectorAll("svg.chart")].map(s => s.getBoundingClientRect().height)}});
}};
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_browser_shows_it_without_overflow(which: str, width: int, dark: bool, result: Path, tmp_path: Path) -> None:
    page = (result / "report.html").read_text() if which == "report" else comparison_page(compared())
    (tmp_path / "look.html").write_text(_LOOK.format(width=width, page=html.escape(page)))
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path}/profile", f"--window-size={max(width, 600)},1000"),
        *(["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]),
        *("--dump-dom", f"file://{tmp_path}/look.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert seen["over"] <= 0
    assert all(height > 100 for height in seen["heights"])
    light = [sum(map(int, re.findall(r"\d+", seen[part])[:3])) for part in ("ink", "back")]
    assert (light[0] > light[1]) == dark
