"""Allocations and codebooks of one's own: the page's classes do what it says, and what is wrong with one is said."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, Run
from rankwise import compress, plugins
from rankwise.allocation import allocation_from
from rankwise.checkpoints import load_model
from rankwise.errors import BudgetError, RecipeError
from rankwise.quantizers import codebook_named, stored_codebook
from rankwise.quantizers.codes import GIVEN
from rankwise.recipes import read_ways, recipe_from
from rankwise.sizes import Plan

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file with the allocation and the codebook of docs/add-a-method.md, as the page has them."""
    _, deeper, powers = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-method.md").read_text(), re.S)
    file = tmp_path / "mine.py"
    file.write_text(deeper + powers)
    return file


def written(tmp_path: Path, code: str) -> str:
    file = tmp_path / "own.py"
    file.write_text(code)
    return str(file)


def test_an_allocation_of_ones_own_spends_the_budget_as_it_says(
    mine: Path, rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", f"text:{text}", "--sequences", "8", "--length", "32", "--run-dir", tmp_path / "run"]
    options += ["--method", "svd", "--keep", "0.6", "--set", "budget.rank_multiple=1"]
    kept = {}
    for slope in (0, 1):
        words = ("--allocation", f"{mine}:Deeper", "--set", f"allocation.slope={slope}")
        status, _, error = rankwise("compress", tiny, "-o", tmp_path / f"{slope}", *options, *words)
        assert status == 0, error
        plan = Plan.load(tmp_path / f"{slope}/plan.json")
        assert plan.allocation == f"{mine}:Deeper"
        assert 0.59 < plan.kept <= 0.6
        kept[slope] = [
            sum(plan.form.bits(plan.shapes[name], cut) for name, cut in plan.cuts.items() if f"layers.{block}." in name)
            for block in (0, 1)
        ]
    assert kept[0][1] == pytest.approx(kept[0][0], rel=0.05)
    assert kept[1][1] == pytest.approx(2 * kept[1][0], rel=0.1)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("Choice({})", r"no cut.*\n(.|\n)*every site"),
        ("Choice({site.name: Cut(10**6) for site in problem.sites})", "above min"),
        ("Choice({site.name: Cut() for site in problem.sites})", "more than a kept fraction of 0.6"),
        ("Choice({site.name: Cut(0, q_bits=2) for site in problem.sites})", "no codes"),
    ],
)
def test_a_choice_that_is_none_of_the_problem_is_refused(
    answer: str, says: str, settings: Values, tmp_path: Path
) -> None:
    code = "from rankwise.allocation import Allocation, Choice\nfrom rankwise.sizes import Cut\n"
    code += f"class Own(Allocation):\n    def choose(self, problem, evidence):\n        return {answer}\n"
    # Found before anything slow would be too early: what is checked there is a choice without losses.
    code += "    def check(self, problem):\n        pass\n"
    recipe = recipe_from(settings(method="svd", budget={"keep": 0.6}, allocation=f"{written(tmp_path, code)}:Own"))
    with pytest.raises((RecipeError, BudgetError), match=says):
        compress(recipe, run_directory=tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        ("Own = 3\n", "Own", "is no allocation"),
        ("", "Own", "holds no allocation; derive it from"),
        ("from rankwise.allocation import Allocation\nclass Own(Allocation): pass\n", "Own", "lacks choose"),
        ("from rankwise.allocation import Allocation\nclass Own(Allocation): pass\n", "Owm", "'Own'"),
        ("x = 1 / 0\n", "Own", r"ZeroDivisionError.*\n.*line 1"),
    ],
)
def test_what_is_wrong_with_an_allocation_is_said(code: str, name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        allocation_from(f"{written(tmp_path, code)}:{name}")


def test_names_of_allocations_keep_their_settings() -> None:
    assert allocation_from("plan:dir/odd.py:x.json").model_dump() == {"name": "plan", "file": "dir/odd.py:x.json"}
    with pytest.raises(RecipeError, match="takes no settings"):
        allocation_from("spectral:3")
    with pytest.raises(RecipeError, match="did you mean 'spectral'"):
        allocation_from("spectrl")


def test_a_codebook_of_ones_own_is_in_the_checkpoint(
    mine: Path, rankwise: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--calibration", f"text:{text}", "--sequences", "8", "--length", "32", "--run-dir", tmp_path / "run"]
    words = ("--method", "quantize", "--codebook", f"{mine}:Powers", "--bits", "3.5")
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "out", *options, *words)
    assert status == 0, error
    plan = Plan.load(tmp_path / "out/plan.json")
    assert plan.form.codebook.startswith(f"{mine}:Powers@")
    assert {cut.q_bits for cut in plan.cuts.values()} <= {2, 3, 4}
    # Again, from finished stages, and without the file: the same weights, and the same logits.
    status, _, error = rankwise("compress", tiny, "-o", tmp_path / "again", *options, *words)
    assert status == 0, error
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    mine.unlink()
    model = load_model(str(tmp_path / "out")).model
    levels = codebook_named(stored_of(model), 3).levels()
    assert levels.tolist() == [-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1]
    code = (
        "import sys; sys.modules['rankwise'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "with torch.no_grad(): print(float(model.float()(torch.arange(8)[None]).logits.double().square().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = float(model.float()(torch.arange(8)[None]).logits.double().square().sum())
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)


def stored_of(model: Any) -> str:
    """The codebook of a layer of three bits."""
    forms = (module.form["q"] for module in model.modules() if hasattr(module, "form") and module.form.get("q"))
    return next(form["codebook"] for form in forms if form["bits"] == 3)


def test_a_recipe_runs_the_code_of_a_codebook_or_an_allocation_only_when_asked_to(
    mine: Path, rankwise: Run, tiny: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for node in (
        f"allocation: {mine}:Deeper",
        f"allocation: {{name: '{mine}:Deeper'}}",
        f"method: {{name: quantize, codebook: '{mine}:Powers'}}\nbudget: {{bits: 3}}",
        f"method: {{name: caldera, lr_codebook: '{mine}:Powers'}}\nbudget: {{bits: 3}}",
    ):
        recipe.write_text(node + "\n")
        status, _, error = rankwise("recipes", "validate", recipe)
        assert status == 2
        assert "may not run" in error
        assert rankwise("recipes", "validate", recipe, "--trust-remote-code")[0] == 0, node


def test_ways_of_a_comparison_name_them(mine: Path) -> None:
    deeper = f"{mine}:Deeper"
    (way,) = read_ways(f"two_sided/{deeper}+blocks", "keep")
    assert (way.method, way.allocation, way.repair) == ("two_sided", deeper, ("blocks",))
    assert [str(each) for each in read_ways(f"svd/{deeper},svd", "keep")] == [f"svd/{deeper}", "svd"]
    with pytest.raises(RecipeError, match="no allocation ''"):
        read_ways("svd/", "keep")


def test_another_version_of_a_codebook_is_refused_by_name(mine: Path, settings: Values) -> None:
    recipe = recipe_from(settings(method={"name": "quantize", "codebook": f"{mine}:Powers"}, budget={"bits": 3}))
    values = recipe.model_dump(mode="json")
    assert recipe_from(values) == recipe
    mine.write_text(mine.read_text().replace("2.0 **", "1.9 **"))
    with pytest.raises(RecipeError, match="has changed since"):
        recipe_from(values)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("known_bits = None", "known_bits"),
        ("known_bits = (4, 2)", "known_bits"),
        ("known_bits = range(10, 11)", "known_bits"),
        ("def levels(self): return [1, 2]", "levels.. of 2 bits fails"),
        ("def levels(self): return {}['x']", "KeyError"),
    ],
)
def test_a_codebook_that_is_none_is_refused_with_the_recipe(body: str, says: str, tmp_path: Path) -> None:
    code = "import torch\nfrom rankwise.quantizers import OwnLevels\nclass Own(OwnLevels):\n"
    code += "    def levels(self): return torch.arange(2.0**self.bits)\n" + f"    {body}\n"
    folder = tmp_path / "me@work"
    folder.mkdir()
    name = f"{written(folder, code)}:Own"
    with pytest.raises(RecipeError, match=says):
        recipe_from({"model": "m", "method": {"name": "quantize", "codebook": name}, "budget": {"bits": 3}})


def test_a_site_that_stays_keeps_its_weight_whatever_an_allocation_says(settings: Values, tmp_path: Path) -> None:
    code = "from rankwise.allocation import Allocation, Choice\nfrom rankwise.sizes import Cut\n"
    code += "class Own(Allocation):\n    plan: bool = True\n    def choose(self, problem, evidence):\n"
    code += "        return Choice({site.name: Cut(2) for site in problem.sites})\n"
    allocation = f"{written(tmp_path, code)}:Own"
    recipe = recipe_from(settings(method="svd", budget={"keep": 0.6}, allocation=allocation, exclude=["*q_proj"]))
    with pytest.raises(RecipeError, match="though it stays"):
        compress(recipe, run_directory=tmp_path / "run")


@pytest.mark.parametrize(
    "levels", ["[1.0, 0, -1, -2]", "[0.0, 1, 2]", "[-1, 0, 1, float('nan')]", "[-4.0, -3, -2, -1]"]
)
def test_levels_that_are_none_are_refused(levels: str, tmp_path: Path) -> None:
    code = "import torch\nfrom rankwise.quantizers import OwnLevels\nclass Own(OwnLevels):\n    def levels(self):\n"
    code += f"        return torch.tensor({levels})\n"
    with pytest.raises(RecipeError, match="ascending finite numbers"):
        stored_codebook(f"{written(tmp_path, code)}:Own", 2)
    with pytest.raises(RecipeError, match="did you mean 'uniform'"):
        codebook_named("unifrm", 2)


def test_entry_points_are_allocations_and_codebooks(monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    own = type(allocation_from(f"{mine}:Deeper")).__mro__[1]

    class Point:
        name, value, dist = "deeper", "mypackage.mine:Deeper", None

        @staticmethod
        def load() -> Any:
            return own

    monkeypatch.setattr(plugins, "installed", lambda group: {"deeper": Point} if "allocations" in group else {})
    recipe = recipe_from({"model": "m", "allocation": {"name": "deeper", "slope": 0.25}})
    assert recipe.allocation.model_dump() == {"name": "deeper", "slope": 0.25, "code": ""}
    assert recipe_from({"model": "m", "allocation": "deeper"}).allocation.name == "deeper"


def test_stored_levels_round_as_their_class_does(mine: Path) -> None:
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 64, generator=source, dtype=torch.float64)
    packed = codebook_named(f"{mine}:Powers", 3, by_row=True).quantize(matrix)
    assert packed.codebook.startswith(GIVEN)
    scaled = packed.dense() / packed.scale
    levels = torch.tensor([-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1], dtype=torch.float64)
    nearest = levels[(matrix / packed.scale)[..., None].sub(levels).abs().argmin(-1)]
    assert torch.equal(scaled, nearest)
