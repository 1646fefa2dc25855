"""Recipes: every ready one is valid, every mistake names its place and the nearest right word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.errors import RecipeError
from rankwise.methods import METHODS, method_named
from rankwise.recipes import Recipe, read_recipe, ready_recipes, recipe_from, set_value
from rankwise.sizes import Budget


@pytest.mark.parametrize("name", ready_recipes())
def test_ready_recipes_are_valid_and_survive_a_round_trip(name: str) -> None:
    recipe = recipe_from({"model": "M", **read_recipe(name)})
    assert recipe_from(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_every_method_can_be_named() -> None:
    for name, kind in METHODS.items():
        assert type(method_named(name)) is kind
        size = {} if kind.default_keep else {"budget": {"bits": 3}}
        assert recipe_from({"model": "M", "method": name, **size}).method == kind()
        assert recipe_from({"model": "M", "method": {"name": name}, **size}).method == kind()


@pytest.mark.parametrize(
    ("method", "budget", "keep", "allocation"),
    [
        ("two_sided", None, 0.8, "spectral"),
        ("two_sided", {"bits": None}, 0.8, "spectral"),
        ("bolaco", {"rank_multiple": 1}, 0.8, "uniform"),
        ("two_sided", {"bits": 4}, None, "spectral"),
        ("two_sided", {"size": "9MB"}, None, "spectral"),
        ("quantize", {"keep": 0.25}, 0.25, "spectral"),
        ("mixed", {"bits": 4}, None, "spectral"),
        ({"name": "quantize", "q_bits": 2}, None, None, "uniform"),
    ],
)
def test_a_size_is_given_by_default_where_the_method_has_one(
    method: Any, budget: Any, keep: float | None, allocation: str
) -> None:
    recipe = recipe_from({"model": "M", "method": method, **({} if budget is None else {"budget": budget})})
    assert recipe.budget.keep == keep
    assert recipe.allocation.name == allocation
    assert recipe.budget.storage == "auto"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "two_sided"),
        ({"budget": {"keep": 0.5}}, "two_sided"),
        ({"budget": {"size": "9MB"}}, "two_sided"),
        ({"budget": {"bits": 4}}, "quantize"),
        ({"budget": {"bits": 4}, "method": None}, "quantize"),
        ({"budget": Budget(bits=4)}, "quantize"),
        ({"budget": {"bits": 4}, "method": "two_sided"}, "two_sided"),
        ({"budget": {"bits": 4}, "method": {"name": "svd"}}, "svd"),
    ],
)
def test_a_size_in_bits_is_of_codes_where_no_method_is_given(values: dict[str, Any], name: str) -> None:
    assert recipe_from({"model": "M", **values}).method.name == name


def test_a_budget_of_another_type_is_refused() -> None:
    for bad in (3, "small", [0.5], True):
        with pytest.raises(RecipeError, match="budget"):
            recipe_from({"model": "M", "budget": bad})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"modle": "M"}, r"'modle' is no key(.|\n)*did you mean 'model'"),
        ({"model": "M", "budget": {"kep": 1}}, r"'kep' is no key(.|\n)*budget\.kep(.|\n)*'keep'"),
        ({"model": "M", "calibration": {"sequence": 1}}, r"did you mean 'sequences'"),
        ({"model": "M", "method": {"name": "bolaco", "group": 4}}, r"method\.group(.|\n)*did you mean 'groups'"),
        ({"model": "M", "method": "bolacco"}, "did you mean 'bolaco'"),
        ({"model": "M", "method": {"name": "bolacco"}}, "did you mean 'bolaco'"),
        ({"model": "M", "allocation": "uniformly"}, "did you mean 'uniform'"),
        ({"method": "svd"}, "'model' is missing"),
        ({"model": "M", "budget": {"keep": 0}}, r"budget\.keep.*greater than 0.*given: 0"),
        ({"model": "M", "budget": {"keep": 1.5}}, r"less than or equal to 1"),
        ({"model": "M", "budget": {"rank_multiple": 0}}, r"rank_multiple"),
        ({"model": "M", "calibration": {"source": "txt:x"}}, "did you mean 'text'"),
        ({"model": "M", "format": "densee"}, "format"),
        ({"model": "M", "max_shard_size": "much"}, "max_shard_size"),
    ],
)
def test_mistakes_are_explained(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe_from(values)


def test_overrides_reach_any_depth_and_named_nodes() -> None:
    values: dict[str, Any] = {"model": "M", "method": "bolaco"}
    set_value(values, "method.groups", 4)
    set_value(values, "budget.rank_multiple", 1)
    recipe = recipe_from(values)
    assert recipe.method.model_dump() == {"name": "bolaco", "groups": 4, "bias": True}
    assert recipe.budget.rank_multiple == 1
    fresh: dict[str, Any] = {"model": "M"}
    set_value(fresh, "method.damping", 1e-3)
    searched: dict[str, Any] = {"allocation": "bayesian:5x4"}
    set_value(searched, "allocation.trials", 6)
    assert searched == {"allocation": {"name": "bayesian", "space": "5x4", "trials": 6}}
    assert recipe_from(fresh).method == Recipe(model="M").method.model_copy(update={"damping": 1e-3})
    with pytest.raises(RecipeError, match="holds a value"):
        set_value(values, "model.x", 1)


def test_unreadable_recipes_say_why(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [1,\n")
    for name, says in (
        (str(tmp_path / "list.yaml"), "not a mapping"),
        (str(tmp_path / "bad.yaml"), "not YAML"),
        (str(tmp_path / "none.yaml"), "cannot be read"),
        ("lord-2", "did you mean 'lord-20'"),
    ):
        with pytest.raises(RecipeError, match=says):
            read_recipe(name)


@pytest.mark.parametrize(
    ("calibration", "device", "at"),
    [
        ({}, "cpu", 6),
        ({}, "cuda", 32),
        ({"sequences": 32}, "cpu", 32),
        ({"gradient_sequences": 5}, "cpu", 5),
        ({"gradient_sequences": 500}, "cuda", 32),
        ({"gradient_sequences": None}, "cpu", 32),
    ],
)
def test_gradients_are_taken_at_few_sequences_where_nothing_is_said_on_a_cpu(
    calibration: dict[str, Any], device: str, at: int
) -> None:
    assert recipe_from({"model": "m", "calibration": calibration}).calibration.gradients_at(32, device) == at


@pytest.mark.parametrize("key", ["sequences", "gradient_sequences"])
@pytest.mark.parametrize("value", [0, "few"])
def test_a_value_of_several_kinds_is_named_by_its_key_and_all_that_it_may_be(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as found:
        recipe_from({"model": "m", "calibration": {key: value}}, origin="here")
    assert found.value.where == f"here: calibration.{key}"
    assert found.value.problem.endswith(f", or 'auto' (given: {value!r}).")
