"""What is said at the end of a run: it rests on what was measured, and names what was not tried."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import ROOT, Run, figures, results
from rankwise.checkpoints import REPORT_FILE
from rankwise.reports import Report, in_lines, model_card, verdict
from rankwise.reports.verdict import HARDLY, LITTLE, MEASURED, MOST, MUCH, Measured, usual

OLD = ROOT / "tests/fixtures/written-by-0.1.0"
DOC = " ".join((ROOT / "docs/verdict.md").read_text().split())


def measured(row: Measured) -> float:
    """Its ratio in the results file, the worst of texts and rows."""
    if row.file == "real_model":
        has: dict[str, Any] = {"row": "two_sided, spectral, auto", "keep": row.size}
        of, dense, part = [has], {"row": "dense"}, ""
    elif row.file == "mixed":
        part = {"SmolLM2-135M": "smollm2-135m"}.get(row.model, row.model)
        of = [{"row": each, "asked": row.size} for each in ("Q alone", "Q + L R", "mixed")]
        # Records of the dense model have no size.
        records = [{"asked": None, **each} for each in results("mixed")[part]]
        before = next(each["perplexity"] for each in records if each["row"] == "dense")
        after = [r["perplexity"] for r in records for has in of if all(r[key] == has[key] for key in has)]
        assert after
        return max(each[text] / before[text] for each in after for text in before)
    else:
        before = results(row.file)["dense"]
        has = {"row": "pivoted, spectral", "keep": row.size}
        return max(figures(row.file, f"perplexity/{text}", "runs", **has)[0] / before[text] for text in before)
    records = [{"keep": None, **each} for each in results(row.file)]
    before = next(each["perplexity"] for each in records if each["row"] == dense["row"])
    after = [r["perplexity"] for r in records if all(r[key] == has[key] for key in has)]
    return max(each[text] / before[text] for each in after for text in before)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.model}-{row.size}")
def test_what_is_usual_was_measured(row: Measured) -> None:
    assert f"{measured(row):.2f}" == f"{row.ratio:.2f}"
    assert f"benchmarks/results/{row.file}.md" in DOC


def test_the_names_of_losses_rest_on_divergences_that_were_measured() -> None:
    dense = results("real_model")[0]["perplexity"]
    pairs = [
        (each["perplexity"][text] / dense[text], each["kl"][text])
        for each in results("real_model")[1:]
        for text in dense
    ]

    def between(low: float, high: float) -> list[float]:
        return sorted(round(kl, 2) for ratio, kl in pairs if low <= ratio < high)

    def ends(found: list[float]) -> tuple[float, float]:
        return found[0], found[-1]

    assert ends(between(1, HARDLY)) == (0.05, 0.07)
    assert ends(between(1.1, LITTLE)) == (0.23, 0.28)
    assert ends(between(LITTLE, MUCH)) == (0.37, 0.49)
    assert min(between(2.5, 1e9)) > 1
    for bound in (HARDLY, LITTLE, MUCH, MOST):
        assert f"{bound:g}" in DOC


def test_a_size_between_those_measured_has_their_range() -> None:
    assert usual(False, 0.8) == (1.0, 1.66)
    assert usual(False, 0.9) == (1.0, 1.08)
    assert usual(False, 0.5) == (1.01, None)
    assert usual(False, 0.7999) == usual(False, 0.8)
    assert usual(True, 3) == (1.01, 1.28)
    assert usual(True, 3.5) == (1.0, 1.28)


def scored(ratio: float, **changes: Any) -> Report:
    """A report of 0.1.0 as if perplexity had become this many times the original's."""
    report = Report.load(OLD / "reports" / "searched.json")
    assert report.evaluation is not None
    after = report.evaluation.dense.perplexity * ratio
    small = type(report.evaluation.compressed)(**{**vars(report.evaluation.compressed), "perplexity": after})
    evaluation = report.evaluation.model_copy(update={"compressed": small})
    return report.model_copy(update={"evaluation": evaluation, "repair": (), **changes})


def keeping(report: Report, got: float) -> Report:
    return report.model_copy(update={"keep": report.keep.model_copy(update={"got": got}), "bits": None})


def named(report: Report, method: str, allocation: str) -> Report:
    settings = {
        "method": report.recipe.method.model_copy(update={"name": method}),
        "allocation": report.recipe.allocation.model_copy(update={"name": allocation}),
    }
    return report.model_copy(update={"recipe": report.recipe.model_copy(update=settings)})


@pytest.mark.parametrize(
    ("ratio", "keep", "says"),
    [
        (1.02, 0.9, ("hardly anything", "usual at 0.9")),
        (1.1, 0.8, ("little", "usual at 0.8")),
        (1.4, 0.9, ("a good deal", "more than usual at 0.9 of the weights (1 to 1.08)")),
        (9.8, 0.5, ("most of what it knew", "usual at 0.5", "stories260k: 4.26 at 0.7")),
        (9.8, 0.8, ("most of what it knew", "more than usual at 0.8")),
        (1.005, 0.5, ("hardly anything", "less than usual at 0.5")),
    ],
)
def test_a_loss_has_a_name_and_is_usual_or_not(ratio: float, keep: float, says: tuple[str, ...]) -> None:
    said = verdict(keeping(scored(ratio), keep))
    assert said.ratio == pytest.approx(ratio)
    for each in says:
        assert each in said.lost
    assert said.lost.startswith("Perplexity on ")


def test_what_to_try_is_in_order_and_has_a_cost() -> None:
    report = named(keeping(scored(9.8, storage="two_factor"), 0.5), "bolaco", "uniform")
    said = verdict(report)
    marks = ("calibration", "--storage auto", "--method two_sided", "--keep 0.75", "--repair refit", "--bits 4")
    places = [next(i for i, each in enumerate(said.next) if mark in each.what) for mark in marks]
    assert places == list(range(len(marks)))
    assert all(each.cost for each in said.next)
    assert f"{report.calibration.sequences * report.calibration.length:,} tokens used" in said.next[0].what
    lines = in_lines(said)
    assert lines[0] == said.lost
    assert lines[2].startswith("  1. ")


def test_what_was_done_is_not_named_again() -> None:
    report = named(keeping(scored(1.6, storage="auto"), 0.5), "two_sided", "spectral")
    text = report.calibration.model_copy(update={"sequences": 256, "length": 256, "source": "text:mine"})
    default = report.model_copy(update={"calibration": text})
    advised = " ".join(each.what for each in verdict(default).next)
    for done in ("calibration", "--storage", "--method two_sided"):
        assert done not in advised
    bundled = default.model_copy(update={"calibration": text.model_copy(update={"source": "bundled"})})
    assert "documentation of Python was used" in verdict(bundled).next[0].what


def test_codes_are_advised_in_bits() -> None:
    report = Report.load(OLD / "quantized" / REPORT_FILE)
    evaluation = scored(1.6).evaluation
    advised = " ".join(each.what for each in verdict(report.model_copy(update={"evaluation": evaluation})).next)
    assert "--bits" in advised
    assert "--keep" not in advised


def test_without_a_text_nothing_is_known() -> None:
    said = verdict(scored(1.0, evaluation=None))
    assert "not known" in said.lost
    assert "--evaluation" in said.next[0].what


def test_without_a_text_what_is_usual_is_said_and_bits_where_that_is_a_good_deal() -> None:
    said = verdict(keeping(scored(1.0, evaluation=None), 0.5))
    low, high = usual(False, 0.5)
    assert high is None
    assert said.usual == (low, high)
    assert f"At 0.5 of the weights a perplexity of {low:.3g} times or more the original's is usual." in said.lost
    assert "--method quantize" in said.next[1].what
    mild = verdict(keeping(scored(1.0, evaluation=None), 0.9))
    assert "a perplexity of 1 to 1.08 times the original's is usual" in mild.lost
    assert [each.what for each in mild.next] == ["--evaluation text:FILE"]


def test_a_run_ends_with_it(rankwise: Run, tiny: Any, text: Any, tmp_path: Any) -> None:
    words = ["--length", 32, "--calibration", f"text:{text}", "--sequences", 8, "--evaluation", f"text:{text}"]
    status, out, _ = rankwise("compress", tiny, "-o", tmp_path / "out", *words)
    report = Report.load(tmp_path / "out" / REPORT_FILE)
    assert status == 0
    assert report.verdict is not None
    assert report.verdict == verdict(report.model_copy(update={"verdict": None, "stages": report.stages}))
    for line in in_lines(report.verdict):
        assert line.split()[-1] in out
    assert "What was lost" in model_card(report)
    assert "times the original's" in " ".join(out.split())
