"""Methods of one's own, in a file or as an entry point, are nodes like any other; what is wrong with one is said."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, Run
from rankwise import compress, plugins
from rankwise.errors import RecipeError
from rankwise.flows.compare import compare
from rankwise.methods import method_named
from rankwise.recipes import comparison_from, read_ways, recipe_from
from rankwise.reports import Report
from rankwise.sizes import Plan

Values = Callable[..., dict[str, Any]]


def blocks_of_the_page() -> list[str]:
    """The three files that docs/add-a-method.md builds."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-method.md").read_text(), re.S)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """The method that docs/add-a-method.md builds, as the page has it."""
    code = blocks_of_the_page()[0]
    assert len(code.strip().splitlines()) <= 30
    folder = tmp_path / "some/where"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(code)
    return f"{folder}/mine.py:RootMeanSquare"


def test_the_page_builds_a_method_that_the_command_takes(
    mine: str, rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", f"text:{text}", "--sequences", "8", "--length", "32", "--run-dir", tmp_path / "run"]
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "out", "--method", mine, "--keep", "0.6", *options)
    assert status == 0, error
    plan, report = Plan.load(tmp_path / "out/plan.json"), Report.load(tmp_path / "out/rankwise_report.json")
    assert plan.method == report.recipe.method.name == mine
    assert plan.method_settings["alpha"] == 1.0
    assert plan.allocation == "uniform"
    # Its answer is its own: other settings, another answer; alpha 0 is svd.
    found = {}
    for alpha in (0, 2):
        method = {"name": mine, "alpha": alpha}
        recipe = {"model": str(tiny), "method": method, "budget": {"keep": 0.6, "rank_multiple": 1}}
        recipe["calibration"] = {"source": f"text:{text}", "sequences": 8, "length": 32}
        found[alpha] = compress(recipe_from(recipe), run_directory=tmp_path / "run").report
        if alpha == 0:
            plain = compress(recipe_from({**recipe, "method": "svd"}), run_directory=tmp_path / "run").report
    energies = {
        name: [site.dropped_energy for site in report.sites.values()]
        for name, report in {"svd": plain, **found}.items()
    }
    assert energies[0] == pytest.approx(energies["svd"], rel=1e-9)
    assert energies[2] != pytest.approx(energies["svd"], rel=1e-3)


def test_a_recipe_and_a_plan_run_code_only_when_asked_to(
    mine: str, rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", f"text:{text}", "--sequences", "8", "--length", "32", "--run-dir", tmp_path / "run"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(tiny), "output": str(tmp_path / "out"), "method": {"name": mine}}))
    status, _, error = rankwise("compress", "--recipe", recipe, *options)
    assert status == 2
    assert "may not run" in error
    for words in (("validate",), ("show",)):
        status, _, error = rankwise("recipes", *words, recipe)
        assert status == 2
        assert "may not run" in error
        assert rankwise("recipes", *words, recipe, "--trust-remote-code")[0] == 0
    status, _, error = rankwise("compress", "--recipe", recipe, "--method", "svd", "-o", tmp_path / "svd", *options)
    assert status == 0, error
    status, _, error = rankwise("compress", "--recipe", recipe, "--trust-remote-code", *options)
    assert status == 0, error
    plan = tmp_path / "out/plan.json"
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "again", "--plan", plan, *options)
    assert status == 2
    assert f"--method {mine}" in error
    words = ("-o", tmp_path / "trusted", "--plan", plan, "--trust-remote-code")
    status, _, error = rankwise("compress", tiny, *words, *options)
    assert status == 0, error
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "again", "--plan", plan, "--method", mine, *options)
    assert status == 0, error
    assert Plan.load(tmp_path / "again/plan.json").cuts == Plan.load(plan).cuts


def test_another_version_of_the_file_is_another_method(mine: str, settings: Values, tmp_path: Path) -> None:
    first = recipe_from(settings(method={"name": mine}))
    one = compress(first, run_directory=tmp_path / "run")
    file = Path(mine.rpartition(":")[0])
    # As long as before, and in the same second: what Python may keep compiled of a file would be the old one.
    times = file.stat()
    file.write_text(file.read_text().replace("squares**self.alpha", "self.alpha**squares"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = recipe_from(settings(method={"name": mine}))
    assert first.method.model_dump()["code"] != second.method.model_dump()["code"]
    two = compress(second, run_directory=tmp_path / "run")
    dropped = [[site.dropped_energy for site in each.report.sites.values()] for each in (one, two)]
    assert dropped[0] != dropped[1]
    with pytest.raises(RecipeError, match="has changed since"):
        recipe_from(first.model_dump(mode="json"))
    assert recipe_from(second.model_dump(mode="json")) == second


def test_it_is_a_way_of_a_comparison(mine: str, settings: Values, tmp_path: Path) -> None:
    ways = read_ways(f"svd,{mine}/uniform,{mine}", "keep", ["refit"])
    assert [str(way) for way in ways[:3]] == ["svd", f"{mine}/uniform", mine]
    assert len(ways) == 6
    values = settings()
    comparison = comparison_from(
        {
            "model": values["model"],
            "output": str(tmp_path / "c"),
            "spelling": "keep",
            "sizes": (0.5,),
            "ways": ways[:2],
            "texts": [{"source": "bundled:heldout", "sequences": 2, "length": 32}],
            "settings": {"calibration": values["calibration"], "budget": {"rank_multiple": 1}},
        }
    )
    found = compare(comparison, run_directory=tmp_path / "run")
    assert [row.problem for row in found.rows] == [None] * 3
    assert found.rows[1].perplexity != found.rows[2].perplexity


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        (None, "RootMeanSquare", "cannot be read"),
        ("x = 1 / 0\n", "RootMeanSquare", r"ZeroDivisionError.*\n.*line 1"),
        ("def f(:\n", "RootMeanSquare", r"SyntaxError.*\n.*line 1"),
        ("RootMeanSquare = 3\n", "RootMeanSquare", "is no method"),
        ("from rankwise.methods import Factorisation\nclass Rms(Factorisation): pass\n", "Rms", "lacks decompose"),
        ("from rankwise.methods import Factorisation\nclass Rms(Factorisation): pass\n", "Rmms", "'Rms'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(code: str | None, name: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(RecipeError, match=says):
        method_named(f"{file}:{name}")


def test_settings_are_checked_like_those_of_any_method(mine: str) -> None:
    for method, says in (
        ({"alhpa": 1}, "did you mean 'alpha'"),
        ({"alpha": 3}, r"less than or equal to 2(.|\n)*alpha"),
    ):
        with pytest.raises(RecipeError, match=says):
            recipe_from({"model": "m", "method": {"name": mine, **method}})
    with pytest.raises(RecipeError, match="did you mean 'svd'"):
        recipe_from({"model": "m", "method": "svdd"})
    for nothing in (5, ["svd"]):
        with pytest.raises(RecipeError):
            recipe_from({"model": "m", "method": nothing})


def test_entry_points_of_installed_packages_are_methods(monkeypatch: pytest.MonkeyPatch, mine: str) -> None:
    kind = method_named(mine)

    class Point:
        name, value, dist = "rms", "mypackage.mine:RootMeanSquare", None

        @staticmethod
        def load() -> Any:
            return type(kind).__mro__[1]

    monkeypatch.setattr(plugins, "installed", lambda group: {"rms": Point} if group == "rankwise.methods" else {})
    recipe = recipe_from({"model": "m", "method": {"name": "rms", "alpha": 0.5}})
    assert recipe.method.model_dump() == {"name": "rms", "alpha": 0.5, "code": ""}
    assert recipe_from({"model": "m", "method": "rms"}).method.name == "rms"
    assert recipe_from(recipe.model_dump(mode="json")) == recipe
