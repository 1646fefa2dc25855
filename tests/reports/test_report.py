"""`Report`: it survives its file, reads the files of 0.1.0, and says one clear thing about any other."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

import rankwise as package
from conftest import ROOT, Run, make_site
from rankwise import compress
from rankwise.allocation import Outcome
from rankwise.checkpoints import REPORT_FILE
from rankwise.errors import BudgetError, ModelError
from rankwise.evaluation import Cost, Perplexity
from rankwise.progress import StageTime
from rankwise.recipes import recipe_from
from rankwise.reports import (
    Advice,
    Bits,
    BlockRepair,
    CalibrationText,
    ExampleCounts,
    FineTuneSettings,
    FineTuneStep,
    Kept,
    KeptPredictions,
    LearnedText,
    Machine,
    Named,
    Part,
    RecipeSettings,
    RepairStep,
    Report,
    Scores,
    SearchSummary,
    SearchTimes,
    SiteReport,
    TrainingStep,
    ValidationText,
    Verdict,
    closing_table,
    model_card,
    verdict,
)
from rankwise.reports.parts import cut_facts
from rankwise.sizes import DENSE, Cut, Plan
from rankwise.stages import tuning

OLD = ROOT / "tests" / "fixtures" / "written-by-0.1.0"
CHECKPOINTS = ("two_factor", "pivoted", "quantized", "mixed_bits")
OLD_FILES = [*(OLD / name / REPORT_FILE for name in CHECKPOINTS), *sorted((OLD / "reports").glob("*.json"))]
SITE = "model.layers.0.self_attn.q_proj"


def strict(text: str) -> Any:
    """JSON as its standard has it, without the names of numbers that are not finite."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def shown(report: Report) -> str:
    """Its table, in words."""
    console = Console(width=120, file=io.StringIO())
    console.print(closing_table(report))
    return str(console.file.getvalue())


# --- Any report survives.

count = st.integers(0, 2**62)
some = st.integers(1, 2**40)
number = st.floats(allow_nan=False, allow_infinity=False)
measured = st.none() | st.floats()
words = st.text(max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


def part(kind: type[Any], optional: dict[str, st.SearchStrategy[Any]] | None = None, **given: Any) -> Any:
    """Any object of a kind; what is optional may be left out, and what is left out stays so."""
    return st.fixed_dictionaries(given, optional=optional or {}).map(lambda values: kind(**values))


def settings_of(kind: type[Any], **known: Any) -> Any:
    """Settings with any further keys."""
    names = words.filter(lambda name: name.isidentifier() and not hasattr(kind, name) and name not in known)
    others = st.dictionaries(names.filter(lambda name: not name.startswith("_")), plain, max_size=3)
    return st.builds(lambda values, more: kind(**more, **values), st.fixed_dictionaries(known), others)


cuts = (
    st.builds(Cut)
    | st.builds(Cut, st.integers(1, 99))
    | st.builds(Cut, st.integers(0, 99), st.integers(1, 8), st.integers(2, 16))
)
cost = st.builds(Cost, *[some] * 4, count, count)
perplexities = st.builds(Perplexity, number, *[count] * 4)
curve = st.lists(part(TrainingStep, step=count, loss=measured, lr=number), max_size=2).map(tuple)
blocks = part(
    BlockRepair,
    {"loss_first": measured, "loss_last": measured, "steps": count},
    block=count, objective_before=measured, objective_after=measured, accepted=st.booleans(),
)  # fmt: skip
repairs = part(
    RepairStep,
    {"blocks": st.lists(blocks, max_size=2).map(tuple), "trained_parameters": count, "history": curve,
     "examples": part(LearnedText, source=words, count=count, tokens=count)},
    step=words, objective_before=measured, objective_after=measured, accepted=st.booleans(), seconds=number,
)  # fmt: skip
tunings = part(
    FineTuneStep,
    {"norm_lost_in_merging": st.dictionaries(words, measured, max_size=2)},
    settings=settings_of(FineTuneSettings, method=words, data=words, settings=st.dictionaries(words, plain)),
    examples=part(ExampleCounts, count=count, held_out=count, tokens=count),
    before=st.none() | perplexities, after=st.none() | perplexities, trained_parameters=count, history=curve,
    loss_before=measured, loss_after=measured, accepted=st.booleans(), cost_before=cost,
)  # fmt: skip
searches = part(
    SearchSummary,
    space=st.none() | words, trials=count, failed=count, best_trial=count, best_origin=words,
    objective=st.builds(Outcome, number, number, number), dense_nll=number,
    validation=part(ValidationText, source=words, sequences=count, length=count, select=words),
    predictions=part(KeptPredictions, form=words, bytes=count, largest_share_of_kl_missed=measured),
    seconds=part(SearchTimes, bare_forward=number, trials=number, optimiser=number),
)  # fmt: skip
facts = st.fixed_dictionaries(
    {},
    optional={
        "damping": measured, "dropped_energy": measured, "errors": st.lists(number, max_size=3).map(tuple),
        "iteration_kept": count, "error": number, "fallback": st.booleans(), "bits": count,
        "storage": st.sampled_from(["two_factor", "pivoted", "quantized"]), "largest_pivot_entry": measured,
    },
)  # fmt: skip
sites = st.builds(
    lambda block, role, shape, cut, more: SiteReport(block=block, role=role, shape=shape, **cut_facts(cut), **more),
    count, words, st.tuples(count, count), cuts, facts,
)  # fmt: skip
reports = part(
    Report,
    {"bytes_on_disk": count, "finetune": st.lists(tunings, max_size=2).map(tuple), "counted": words,
     "verdict": st.none() | st.builds(lambda said, more: Verdict(lost=said, next=(Advice(what=more, cost=said),)),
                                      words, words)},
    recipe=settings_of(
        RecipeSettings, model=words, format=st.sampled_from(["low_rank", "dense"]), max_shard_size=words,
        method=settings_of(Named, name=words), allocation=settings_of(Named, name=words),
    ),
    model_fingerprint=words, architecture=words, keep=part(Kept, asked=st.none() | number, got=number),
    bits=st.none() | part(Bits, asked=st.none() | number, got=number, before=number),
    storage=st.sampled_from(["two_factor", "pivoted", "auto"]), size=st.none() | count, coded=st.booleans(),
    before=cost, after=cost, biases_added=count,
    evaluation=st.none() | part(Scores, source=words, dense=perplexities, compressed=perplexities),
    calibration=part(CalibrationText, source=words, sequences=count, length=count, available=count, fingerprint=words),
    search=st.none() | searches, repair=st.lists(repairs, max_size=2).map(tuple),
    groups=st.dictionaries(words, number, max_size=3), sites=st.dictionaries(words, sites, max_size=3),
    stages=st.dictionaries(words, st.builds(StageTime, number, count, st.booleans()), max_size=2),
    machine=part(Machine, dict.fromkeys(("system", "python", "torch", "transformers"), words), device=words,
                 rankwise=words),
    notes=st.lists(words, max_size=2).map(tuple), run_directory=words,
)  # fmt: skip


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(report=reports)
def test_any_report_survives_its_file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "report.json"
    report.save(path)
    assert strict(path.read_text(encoding="utf-8")) == report.model_dump(mode="json")
    again = Report.load(path)
    assert again == report
    assert again.model_dump_json() == report.model_dump_json()
    assert Verdict.model_validate(verdict(report).model_dump(mode="json")) == verdict(report)


def test_what_a_run_returns_is_what_it_wrote(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = compress(recipe_from(settings(output=str(tmp_path / "out")))).report
    written = Report.load(tmp_path / "out" / REPORT_FILE)
    assert set(report.stages) - set(written.stages) == {"checkpoint"}
    assert written.model_copy(update={"stages": report.stages}) == report
    values = strict((tmp_path / "out" / REPORT_FILE).read_text())
    assert "finetune" not in values
    assert (values["evaluation"], values["search"], values["size"]) == (None, None, None)
    assert values["sites"][SITE].keys() == {
        "block", "role", "shape", "rank", "damping", "dropped_energy", "bits", "storage", "largest_pivot_entry"
    }  # fmt: skip
    assert recipe_from(report.recipe.model_dump()) == recipe_from(settings(output=str(tmp_path / "out")))
    with pytest.raises(ValidationError, match="frozen"):
        report.coded = True  # type: ignore[misc]
    assert package.Report is Report


@pytest.mark.parametrize("cut", [DENSE, Cut(8), Cut(0, 2), Cut(8, 2, 4), Cut(8, 0, 4)], ids=str)
def test_a_site_says_its_cut(cut: Cut) -> None:
    """Bits of Q and of L and R stand at every coded site, and at no other."""
    site = SiteReport.of(make_site("a", 16, 24), cut, bits=99)
    values = site.model_dump(mode="json")
    coded = {"q_bits": cut.q_bits, "lr_bits": cut.lr_bits} if cut.coded else {}
    assert values == {"block": 0, "role": "q", "shape": [16, 24], "rank": cut.rank, **coded, "bits": 99}
    assert SiteReport.model_validate(values).cut == site.cut == cut
    assert site.with_cut(Cut(4, 3, 2), storage="quantized").cut == Cut(4, 3, 2)
    assert site.with_cut(Cut(4, 3, 2)).bits == 99


# --- Numbers that are not finite.


def test_a_number_that_is_not_finite_is_null_and_said(tmp_path: Path) -> None:
    old = Report.load(OLD / "reports" / "tuned.json")
    for wrong in (float("inf"), float("-inf"), float("nan")):
        step = RepairStep(step="refit", objective_before=wrong, objective_after=2.5, accepted=True, seconds=1.0)
        tuned = FineTuneStep(**{**old.finetune[0].model_dump(), "loss_before": wrong})
        report = old.model_copy(update={"repair": (step,), "finetune": (tuned,)})
        report.save(tmp_path / "report.json")
        values = strict((tmp_path / "report.json").read_text())
        assert (values["repair"][0]["objective_before"], values["repair"][0]["objective_after"]) == (None, 2.5)
        assert Report.load(tmp_path / "report.json") == report
        assert "objective on validation samples not finite before, 2.5 after" in model_card(report)
        assert "held out not finite before" in model_card(report)
        assert "not finite" in shown(report)


def test_where_0_1_0_wrote_infinity_it_is_read_as_not_finite(tmp_path: Path) -> None:
    values = json.loads((OLD / "reports" / "searched.json").read_text())
    values["repair"][0]["objective_before"] = float("inf")
    values["repair"][1]["blocks"][0]["objective_after"] = float("nan")
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert "Infinity" in (tmp_path / "report.json").read_text()
    report = Report.load(tmp_path / "report.json")
    assert report.repair[0].objective_before is None
    assert report.repair[1].blocks[0].objective_after is None


def test_a_setting_that_is_infinite_can_be_set_again() -> None:
    method = {"name": "two_sided", "curvature_gb": float("inf")}
    recipe = recipe_from({"model": "m", "method": method})
    kept = RecipeSettings(**recipe.model_dump(mode="json"))
    assert strict(json.dumps(kept.model_dump(mode="json")))["method"]["curvature_gb"] == "Infinity"
    assert recipe_from(kept.model_dump()) == recipe


def test_a_perplexity_that_is_not_finite_is_no_report(tmp_path: Path) -> None:
    values = json.loads((OLD / "reports" / "searched.json").read_text())
    values["evaluation"]["dense"]["perplexity"] = float("inf")
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="finite number") as raised:
        Report.load(tmp_path / "report.json")
    assert raised.value.where == f"{tmp_path / 'report.json'}: evaluation.dense.perplexity"


# --- Files of 0.1.0.


@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_0_1_0_wrote_is_read_and_written_with_the_same_keys(path: Path, tmp_path: Path) -> None:
    report = Report.load(path)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    before, after = (json.loads(file.read_text()) for file in (path, tmp_path / "report.json"))
    assert (after.pop("size"), after.pop("coded")) == (None, report.bits is not None)
    for site in after["sites"].values():
        if "q_bits" in site:
            assert site.pop("lr_bits") == (before["recipe"]["method"]["lr_bits"] if site["rank"] else None)
    assert after == before
    assert "Made by rankwise 0.1.0" in model_card(report)
    assert "linear parameters" in shown(report)


def test_the_whole_of_a_report_of_0_1_0() -> None:
    searched, tuned = (Report.load(OLD / "reports" / f"{name}.json") for name in ("searched", "tuned"))
    assert searched.search is not None
    assert searched.search.trials == 3
    assert searched.evaluation is not None
    assert searched.evaluation.dense.tokens == searched.evaluation.compressed.tokens == 12 * 31
    assert [step.step for step in searched.repair] == ["refit", "blocks", "subspace", "factors"]
    assert (searched.finetune, tuned.evaluation) == ((), None)
    (step,) = tuned.finetune
    assert (step.settings.method, step.examples.held_out) == ("lora", 4)
    assert step.norm_lost_in_merging is not None
    assert set(step.norm_lost_in_merging) == {name for name, site in tuned.sites.items() if site.rank}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sites_of_0_1_0_have_the_cuts_of_the_plan(name: str) -> None:
    report, plan = tuning.read_results(OLD / name)
    assert {site: each.cut for site, each in report.sites.items()} == plan.cuts
    assert report.coded == plan.coded


# --- Hostile files.


def without(*place: str) -> Callable[[dict[str, Any]], None]:
    def take(values: dict[str, Any]) -> None:
        for key in place[:-1]:
            values = values[key]
        del values[place[-1]]

    return take


def holding(value: Any, *place: str) -> Callable[[dict[str, Any]], None]:
    def put(values: dict[str, Any]) -> None:
        for key in place[:-1]:
            values = values[key]
        values[place[-1]] = value

    return put


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "no format": (without("format"), "it has no format", ""),
    "other format": (holding("rankwise-report/9", "format"), "format 'rankwise-report/9', and this version reads", ""),
    "a plan": (holding("rankwise-plan/2", "format"), "format 'rankwise-plan/2'", ""),
    "format of another type": (holding([1], "format"), r"format \[1\]", ""),
    "key missing": (without("keep"), "lacks 'keep'", ""),
    "key of a part missing": (without("calibration", "length"), "lacks 'calibration.length'", ""),
    "key of a size missing": (without("before", "bytes"), "lacks 'before.bytes'", ""),
    "key of a site missing": (without("sites", SITE, "rank"), f"lacks 'sites.{SITE}.rank'", ""),
    "key of the recipe missing": (without("recipe", "method", "name"), "lacks 'recipe.method.name'", ""),
    "no mapping": (holding([], "sites"), "valid dictionary", "sites"),
    "no number": (holding("many", "after", "parameters"), "valid integer", "after.parameters"),
    "nothing": (holding(None, "before"), "instance of Cost", "before"),
    "three sizes": (holding([1, 2, 3], "sites", SITE, "shape"), "at most 2", f"sites.{SITE}.shape"),
    "a negative rank": (holding(-1, "sites", SITE, "rank"), "greater than or equal to 0", f"sites.{SITE}.rank"),
    "rank of a dense weight": (holding(2, "sites", SITE, "lr_bits"), "full rank", f"sites.{SITE}"),
    "unknown key": (holding(1, "kept"), "'kept' is no key of a report", "kept"),
    "unknown key of a site": (holding(1, "sites", SITE, "rnk"), "'rnk' is no key of a report", f"sites.{SITE}.rnk"),
    "unknown key of a size": (holding(1, "after", "gigabytes"), "'gigabytes' is no key", "after.gigabytes"),
    "misspelt key": (lambda v: v.update(kep=v.pop("keep")), "'kep' is no key of a report", "kep"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_gives_one_clear_error(how: str, tmp_path: Path) -> None:
    change, message, place = HOSTILE[how]
    values = json.loads((OLD / "two_factor" / REPORT_FILE).read_text())
    values["sites"][SITE] = {"block": 0, "role": "q", "shape": [16, 16], "rank": None}
    path = tmp_path / "report.json"
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message) as raised:
        Report.load(path)
    problem = raised.value
    assert problem.where == (f"{path}: {place}" if place else str(path))
    assert problem.remedy
    assert "\n" not in problem.problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no format"),
        (b"null", "no format"),
        (b'"rankwise-report/1"', "no format"),
        (b'{"format": "rankwise-report/1"}', "lacks 'recipe'"),
    ],
)
def test_a_file_that_is_no_report_gives_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        Report.load(tmp_path / "report.json")
    assert raised.value.where == str(tmp_path / "report.json")
    assert raised.value.remedy


def test_a_file_cut_short_anywhere_gives_one_clear_error(tmp_path: Path) -> None:
    whole = (OLD / "two_factor" / REPORT_FILE).read_bytes().rstrip()
    path = tmp_path / "report.json"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="not JSON"):
            Report.load(path)


def test_no_file_and_a_directory_give_one_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            Report.load(path)


def test_a_key_of_the_recipe_that_is_not_known_is_kept(tmp_path: Path) -> None:
    values = json.loads((OLD / "two_factor" / REPORT_FILE).read_text())
    values["recipe"] |= {"of a later version": {"a": [1, None]}}
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert Report.load(tmp_path / "report.json").recipe.model_dump(mode="json") == values["recipe"]


def test_a_plan_of_other_sites_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "two_factor", tmp_path / "model")
    plan = Plan.load(folder / "plan.json")
    other = {name: (n, m) for name, (m, n) in plan.shapes.items()}
    renamed = {f"{name}.x": shape for name, shape in plan.shapes.items()}
    fewer = dict(list(plan.shapes.items())[1:])
    down = "model.layers.0.self_attn.k_proj"
    for shapes, name in ((other, down), (renamed, SITE), (fewer, SITE)):
        cuts = dict(zip(shapes, plan.cuts.values(), strict=False))
        new = plan.model_copy(update={"shapes": shapes, "cuts": cuts})
        (folder / "plan.json").write_text(new.model_dump_json())
        with pytest.raises(ModelError, match=f"of other sites: {name} differs"):
            tuning.read_results(folder)
    (folder / "plan.json").write_text("{")
    with pytest.raises(BudgetError, match="plan cannot be read"):
        tuning.read_results(folder)
    (folder / "plan.json").unlink()
    with pytest.raises(ModelError, match="no directory that rankwise compress wrote"):
        tuning.read_results(folder)


def test_finetune_says_what_is_wrong_with_a_report(rankwise: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "two_factor", tmp_path / "model")
    values = json.loads((folder / REPORT_FILE).read_text())
    (folder / REPORT_FILE).write_text(json.dumps({**values, "format": "rankwise-report/9"}))
    status, out, err = rankwise("finetune", folder, "--data", "bundled", "-o", tmp_path / "tuned")
    assert (status, out) == (2, "")
    assert "rankwise-report/9" in err
    assert str(folder / REPORT_FILE) in err
    assert "Traceback" not in err


# --- What is documented.


def parts_of(kind: type[Part]) -> set[type[Part]]:
    return {kind}.union(*(parts_of(each) for each in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(parts_of(Part), key=lambda kind: kind.__name__))
def test_every_attribute_is_described(kind: type[Part]) -> None:
    described = [line.strip().partition(":")[0] for line in (kind.__doc__ or "").splitlines()]
    for name in kind.__annotations__:
        if name in kind.model_fields:
            assert name in described, f"{kind.__name__}.{name}"
