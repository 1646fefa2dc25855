"""Paths in a recipe's file are relative to that file, and files that are not there are named before anything slow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Run, failed
from rankwise import checkpoints
from rankwise.reading import parse_yaml
from rankwise.recipes import read_recipe, ready_recipes
from rankwise.recipes.paths import beside


def test_a_recipe_runs_from_anywhere(
    rankwise: Run, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept/recipes"
    folder.mkdir(parents=True)
    shutil.copytree(tiny, tmp_path / "kept/model")
    shutil.copy(text, folder / "text.txt")
    (folder / "mine.yaml").write_text(
        "model: ../model\noutput: ../small\nmethod: svd\nbudget: {keep: 0.6}\n"
        "calibration: {source: 'text:text.txt', sequences: 8, length: 32}\n"
    )
    for where in (tmp_path, folder):
        monkeypatch.chdir(where)
        name = "kept/recipes/mine.yaml" if where == tmp_path else "mine.yaml"
        status, _, error = rankwise("compress", "--recipe", name, "--run-dir", tmp_path / "run")
        assert status == 0, error
        assert (tmp_path / "kept/small/model.safetensors").is_file()
        assert rankwise("recipes", "validate", name)[0] == 0


def test_what_is_a_path_is_seen_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    given = {
        "model": "there",
        "output": "/absolute/out",
        "calibration": {"source": "jsonl:data/a.jsonl#text", "sequences": 3},
        "validation": {"source": "bundled:heldout"},
        "evaluation": {"source": "wikitext2"},
        "repair": {"data": "alpaca:x.jsonl"},
        "allocation": "plan:plans/p.json",
        "method": {"name": "mine.py:Own", "codebook": "e8p", "lr_codebook": "b.py:Levels"},
    }
    found = beside(given, f"{tmp_path}/r.yaml")
    assert found == {
        "model": f"{tmp_path}/there",
        "output": "/absolute/out",
        "calibration": {"source": f"jsonl:{tmp_path}/data/a.jsonl#text", "sequences": 3},
        "validation": {"source": "bundled:heldout"},
        "evaluation": {"source": "wikitext2"},
        "repair": {"data": f"alpaca:{tmp_path}/x.jsonl"},
        "allocation": f"plan:{tmp_path}/plans/p.json",
        "method": {"name": f"{tmp_path}/mine.py:Own", "codebook": "e8p", "lr_codebook": f"{tmp_path}/b.py:Levels"},
    }
    assert given["calibration"] == {"source": "jsonl:data/a.jsonl#text", "sequences": 3}
    for same in ({"model": "org/name", "allocation": "bayesian:5x1"}, {"model": None, "method": 3, "repair": []}):
        assert beside(same, f"{tmp_path}/r.yaml") == same
    monkeypatch.chdir(tmp_path)
    of_a_search = {"allocation": {"name": "bayesian", "plan": "p.json"}}
    assert beside(of_a_search, "a/r.yaml") == {"allocation": {"name": "bayesian", "plan": f"{tmp_path}/a/p.json"}}
    assert beside({"allocation": "m.py:Own"}, "a/../b/r.yaml") == {"allocation": f"{tmp_path}/b/m.py:Own"}
    assert beside(given, "r.yaml") == found


@pytest.mark.parametrize("path", ["~a\0b", "~\ud800/x"])
def test_what_is_no_path_is_left_for_validation(path: str, tmp_path: Path) -> None:
    assert beside({"output": path, "model": path}, f"{tmp_path}/r.yaml") == {"output": path, "model": path}


@pytest.mark.parametrize("name", sorted(ready_recipes()))
def test_ready_recipes_name_no_paths(name: str) -> None:
    values = parse_yaml(ready_recipes()[name])
    assert read_recipe(name) == beside(values, "/elsewhere/r.yaml") == values


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("calibration: {source: 'text:gone.txt'}", "gone.txt"),
        ("validation: {source: 'jsonl:gone.jsonl#text'}", "gone.jsonl"),
        ("evaluation: {source: 'parquet:gone.parquet#text'}", "gone.parquet"),
        ("repair: {steps: [blocks], data: 'alpaca:gone.jsonl'}", "gone.jsonl"),
        ("allocation: 'plan:gone.json'", "gone.json"),
        ("allocation: {name: bayesian, plan: gone.json}", "gone.json"),
        ("model: ./gone", "gone"),
    ],
)
def test_files_that_are_not_there_are_found_by_validate_and_before_the_model_is_loaded(
    keys: str, says: str, rankwise: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text((f"model: {tiny}\n" if "model" not in keys else "") + keys + "\n")
    failed(rankwise("recipes", "validate", recipe), says)

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoints, "load_model", loads)
    if "model" not in keys:
        failed(rankwise("compress", "--recipe", recipe, "-o", tmp_path / "out"), says)


def test_evaluate_and_finetune_look_first_too(
    rankwise: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoints, "load_model", loads)
    failed(rankwise("evaluate", tiny, "--perplexity", "bundled:heldout,text:gone.txt"), "gone.txt")
    failed(rankwise("finetune", tiny, "-o", tmp_path / "out", "--data", "text:gone.txt"), "gone.txt")
