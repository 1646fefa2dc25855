"""Names of others stay names in Markdown, in pictures and on the terminal."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from conftest import ROOT
from rankwise.reports import Report, draw_losses, draw_plan, model_card, plan_facts, plan_table
from rankwise.reports.escaping import cell, in_code, in_markdown, in_picture, printable
from rankwise.reports.trained import TrainingStep
from rankwise.sizes import Plan

OLD = ROOT / "tests" / "fixtures" / "written-by-0.1.0"
MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")

HOSTILE = st.text(st.sampled_from("|`*_[]()<>#!-+=~$&\\:;/.\"'1aZ \n\t\r\0\x1b\u2028é{}%@"), max_size=24) | st.text(
    max_size=12
)
SHOWN = [
    "<script>alert(1)</script>",
    "a|b",
    "```",
    "[x](http://y)",
    "\n\n# title",
    "&amp;",
    "1. one",
    "- - x",
    "\ud800",
]


def inline(source: str) -> list[Any]:
    """The inline tokens of one paragraph, which is all that is in the text."""
    tokens = MARKDOWN.parse(source)
    assert [each.type for each in tokens] == ["paragraph_open", "inline", "paragraph_close"], source
    return tokens[1].children or []


@example(text="<script>alert(1)</script>")
@example(text="a _b_ __c__ ~~d~~")
@example(text="`\\`")
@given(text=HOSTILE)
def test_text_in_markdown_is_shown_as_it_is(text: str) -> None:
    wanted = printable(text)
    if not wanted:
        assert in_markdown(text) == ""
        return
    tokens = inline(in_markdown(text))
    assert {each.type for each in tokens} <= {"text", "text_special"}
    assert "".join(each.content for each in tokens) == wanted


def test_a_pipe_begins_no_cell_of_a_table() -> None:
    for shown in (in_markdown("a|b \\| c"), in_code("a|b")):
        cells = [each for each in MARKDOWN.parse(f"| x | y |\n|---|---|\n| {shown} | z |\n") if each.type == "inline"]
        assert [each.content for each in cells[2:]][-1] == "z"
        assert len(cells) == 4


@example(text="`")
@example(text="a``b`")
@example(text="a|b")
@given(text=HOSTILE)
def test_code_in_markdown_is_shown_as_it_is(text: str) -> None:
    (token,) = inline(in_code(text))
    assert token.type == "code_inline"
    assert token.content == (printable(text).replace("|", "\N{BROKEN BAR}") or "(nothing)")


def shape(card: str) -> list[str]:
    """What a card is made of, whatever stands in it."""
    kinds = []
    for token in MARKDOWN.parse(card.split("---\n", 2)[2]):
        kinds.append(token.type)
        kinds += [child.type for child in token.children or [] if child.type not in ("text", "text_special")]
    return kinds


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.load(OLD / "reports" / "tuned.json")


def renamed(report: Report, text: str) -> Report:
    recipe = report.recipe.model_copy(update={"model": f"models/{text}"})
    calibration = report.calibration.model_copy(update={"source": text})
    machine = report.machine.model_copy(update={"rankwise": text})
    changes = {"recipe": recipe, "calibration": calibration, "architecture": text, "machine": machine}
    return report.model_copy(update={**changes, "notes": (text, text), "counted": text})


@settings(max_examples=40, deadline=None)
@given(text=HOSTILE | st.sampled_from(SHOWN))
def test_a_card_has_one_form_whatever_the_model_is_called(report: Report, text: str) -> None:
    card = model_card(renamed(report, f"a{text}a"))
    assert shape(card) == shape(model_card(renamed(report, "aa")))
    assert "html" not in " ".join(shape(card))
    assert card.encode()


@given(text=HOSTILE)
def test_a_cell_holds_its_text_and_nothing_that_steers_a_terminal(text: str) -> None:
    out = io.StringIO()
    Console(file=out, width=400).print(cell(f"[bold]{text}[/x]"))
    assert " ".join(out.getvalue().split()) == " ".join(printable(f"[bold]{text}[/x]").split())
    assert "\x1b" not in out.getvalue()


def strange_plan(name: str) -> Plan:
    plan = Plan.load(OLD / "pivoted" / "plan.json")
    first = next(iter(plan.cuts))
    changed = {"shapes": plan.shapes | {name: plan.shapes[first]}, "cuts": plan.cuts | {name: plan.cuts[first]}}
    return plan.model_copy(update={**changed, "method": name, "allocation": name})


@pytest.mark.parametrize("name", ["o[/x]", r"$\frac{$", "<script>", "a\x1b[2J\0b", "[link=x]y", "²", "x" * 300])
def test_plans_with_strange_names_are_printed_and_drawn(name: str, tmp_path: Path) -> None:
    plan = strange_plan(f"layers.0.{name}")
    Console(file=io.StringIO()).print(plan_table(plan))
    assert all(text == printable(text) for _, text in plan_facts(plan))
    draw_plan(tmp_path / "plan.svg", plan)
    draw_losses(tmp_path / "losses.svg", {name: (TrainingStep(step=1, loss=1.0, lr=0.1),)})
    for file in ("plan.svg", "losses.svg"):
        assert not [each for each in ET.parse(tmp_path / file).iter() if each.tag.endswith("script")]
    assert in_picture("$") == r"\$"
