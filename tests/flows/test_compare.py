"""Comparisons: rows under one protocol, the original first, kept as they come, and tables of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from conftest import Run
from rankwise import compress
from rankwise.errors import RecipeError
from rankwise.flows.compare import compare
from rankwise.recipes import Way, comparison_from, read_sizes, read_ways, recipe_from
from rankwise.reports import ComparedModels, ComparedRow

Values = dict[str, Any]


@pytest.fixture
def asked(settings: Callable[..., Values], tmp_path: Path) -> Callable[..., Values]:
    """A small comparison as plain values."""
    recipe = settings()
    text = {**recipe["evaluation"], "sequences": 2} if recipe.get("evaluation") else {"source": "bundled:heldout"}

    def make(**changes: Any) -> Values:
        shared = {"calibration": recipe["calibration"], "budget": {"rank_multiple": 1}}
        values: Values = {
            "model": recipe["model"],
            "output": str(tmp_path / "compared"),
            "spelling": "keep",
            "sizes": (0.8, 0.5),
            "ways": read_ways("svd,two_sided/uniform", "keep"),
            "texts": [{"length": 32, **text}],
            "settings": shared,
        }
        return {**values, **changes}

    return make


def test_rows_are_what_compress_and_evaluate_give(asked: Callable[..., Values], rankwise: Run, tmp_path: Path) -> None:
    comparison = comparison_from(asked())
    found = compare(comparison, run_directory=tmp_path / "run")
    assert [(row.way, row.asked) for row in found.rows] == [
        ("dense", None),
        *((way, size) for size in (0.8, 0.5) for way in ("svd", "two_sided/uniform")),
    ]
    source = comparison.texts[0].source
    # The same, by hand: a checkpoint on disk, scored by the command.
    row = found.rows[2]
    values = comparison.recipe(comparison.ways[1], 0.8, 0).model_dump(mode="json")
    made = compress(recipe_from({**values, "output": str(tmp_path / "out")}), run_directory=tmp_path / "other")
    assert row.bytes == made.report.after.bytes
    assert row.keep == made.plan.kept
    text = comparison.texts[0]
    options = ["--text", source, "--length", str(text.length), "--bos", text.bos]
    options += [] if text.sequences is None else ["--sequences", str(text.sequences)]
    status, out, error = rankwise("evaluate", tmp_path / "out", *options, "--json")
    assert status == 0, error
    assert row.perplexity[source] == pytest.approx(json.loads(out)["perplexity"], rel=1e-5)
    assert found.dense.keep == 1.0
    assert found.dense.bytes > row.bytes
    assert found.dense.macs > row.macs


@pytest.mark.long
def test_a_comparison_goes_on_after_a_stop_and_with_more(
    asked: Callable[..., Values], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.flows import compress as flow

    made: list[Any] = []
    real = flow.compress

    def counting(recipe: Any, **options: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(recipe)
        return real(recipe, **options)

    monkeypatch.setattr(flow, "compress", counting)
    with pytest.raises(KeyboardInterrupt):
        compare(comparison_from(asked()), run_directory=tmp_path / "run")
    # What there is can be read.
    assert len(ComparedModels.load(tmp_path / "compared/comparison.json").rows) == 3
    made[:] = [None] * 3
    found = compare(comparison_from(asked()), run_directory=tmp_path / "run")
    assert len(made) == 5
    assert len(found.rows) == 5
    # All rows are there: nothing is made, and further ways add theirs.
    made[:] = [None] * 3
    assert compare(comparison_from(asked()), run_directory=tmp_path / "run") == found
    assert len(made) == 3
    more = compare(
        comparison_from(asked(ways=read_ways("svd,two_sided/uniform,afm", "keep"))), run_directory=tmp_path / "run"
    )
    assert len(made) == 5
    assert [row for row in more.rows if row.way != "afm"] == list(found.rows)
    # Another seed, another protocol, another text under the same name: other rows.
    calibration = Path(asked()["settings"]["calibration"]["source"].removeprefix("text:"))
    one = {"sizes": (0.8,), "ways": read_ways("svd", "keep")}
    for changes in ({"seeds": (1,)}, {"texts": [{"source": "bundled:heldout", "sequences": 1, "length": 32}]}, {}):
        if not changes:
            calibration.write_text(calibration.read_text() + "one more line\n")
        made[:] = [None] * 3
        compare(comparison_from(asked(**{**one, **changes})), run_directory=tmp_path / "run")
        assert len(made) == 4, changes


@pytest.mark.long
def test_a_damaged_row_is_made_again(asked: Callable[..., Values], tmp_path: Path) -> None:
    comparison = comparison_from(asked(sizes=(0.8,)))
    found = compare(comparison, run_directory=tmp_path / "run")
    file = tmp_path / "compared/rows.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:1], lines[1].replace('"keep": 0.', '"keep": 1.'), *lines[2:]]) + "\n")
    again = compare(comparison, run_directory=tmp_path / "run")
    assert [row.keep for row in again.rows] == [row.keep for row in found.rows]
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in found.rows]


def test_a_size_that_nothing_meets_says_so_and_the_rest_goes_on(asked: Callable[..., Values], tmp_path: Path) -> None:
    found = compare(comparison_from(asked(sizes=(0.0001, 0.8))), run_directory=tmp_path / "run")
    by_size = {row.asked: row for row in found.rows if row.way == "svd"}
    assert "Nothing fits" in str(by_size[0.0001].problem)
    assert by_size[0.0001].perplexity == {}
    assert by_size[0.8].problem is None
    shown = found.as_markdown()
    assert "no plan" in shown
    assert "What could not be made" in shown


def test_a_model_that_cannot_be_scored_says_so_and_the_rest_goes_on(
    asked: Callable[..., Values], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install '.[tasks]'")
    from rankwise.flows import compress as flow

    real = flow.compress

    def damaging(recipe: Any, **options: Any) -> Any:
        result = real(recipe, **options)
        if recipe.method.name == "svd":
            result.model.model.norm.weight.data[0] = float("nan")
        return result

    monkeypatch.setattr(flow, "compress", damaging)
    values = asked(sizes=(0.5,), tasks=("local_arithmetic",), limit=2)
    for _ in range(2):
        found = compare(comparison_from(values), run_directory=tmp_path / "run")
        assert "layer model.norm" in str(found.rows[1].problem)
        assert found.rows[2].problem is None


@pytest.mark.long
def test_a_plan_that_was_not_there_is_tried_again(asked: Callable[..., Values], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    values = asked(sizes=(0.5,), ways=read_ways(f"svd/plan:{plan},svd", "keep"))
    found = compare(comparison_from(values), run_directory=tmp_path / "run")
    assert found.rows[1].problem is not None
    made = compress(comparison_from(values).recipe(Way.parse("svd"), 0.5, 0), run_directory=tmp_path / "run")
    plan.write_text(made.plan.model_dump_json())
    found = compare(comparison_from(values), run_directory=tmp_path / "run")
    assert found.rows[1].problem is None
    assert found.rows[1].perplexity == found.rows[2].perplexity


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("methods.sdv.x=1", "did you mean 'svd'"),
        ("methods=3", "not keys"),
        ("budget=3", "not keys"),
        ("budget.keep=0.1", "columns"),
        ("repair.steps=[blocks]", "rows"),
    ],
)
def test_keys_that_would_mean_nothing_are_refused(
    assignment: str, says: str, rankwise: Run, tiny: Path, tmp_path: Path
) -> None:
    options = ("-o", tmp_path / "c", "--keep", "0.8", "--methods", "svd")
    status, _, error = rankwise("compare", tiny, *options, "--set", assignment)
    assert status == 2
    assert says in error
    empty = tmp_path / "empty.txt"
    empty.touch()
    for source, says in (("text:none", "no such file"), (f"text:{empty}", "holds no text")):
        status, _, error = rankwise("compare", tiny, *options, "--calibration", source)
        assert status == 2
        assert says in error


@pytest.mark.long
def test_tasks_seeds_and_texts_of_all_models(asked: Callable[..., Values], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install '.[tasks]'")
    values = asked(
        sizes=(0.5,),
        ways=read_ways("two_sided", "keep"),
        seeds=(0, 1),
        tasks=("local_cloze", "local_arithmetic"),
        limit=6,
        prompts=("Return a | b",),
        new_tokens=4,
    )
    found = compare(comparison_from(values), run_directory=tmp_path / "run")
    dense, *rows = found.rows
    assert [row.seed for row in rows] == [0, 1]
    for row in rows:
        for figure in row.tasks:
            before = dense.by_example[f"{figure.task}, {figure.metric}"]
            after = row.by_example[f"{figure.task}, {figure.metric}"]
            assert figure.difference == pytest.approx(mean(after) - mean(before))
            assert figure.difference_error is not None
        assert row.generations["Return a | b"].startswith("Return a")
    (source,) = found.texts
    lines = list(csv.DictReader(io.StringIO(found.as_csv())))
    assert [line["way"] for line in lines] == ["dense", "two_sided", "two_sided"]
    assert float(lines[1][f"perplexity {source}"]) == rows[0].perplexity[source]
    assert float(lines[2]["local_cloze acc"]) == rows[1].tasks[0].score
    (cell,) = (line[1] for line in found.grid(lambda row: row.perplexity.get(source), ".3f"))
    assert cell.startswith(f"{mean(row.perplexity[source] or 0 for row in rows):.3f} ± ")
    assert r"Return a \| b" in found.as_markdown()
    assert ComparedModels.load(tmp_path / "compared/comparison.json") == found


def test_ways_are_read_and_bad_parts_named() -> None:
    ways = read_ways("svd,bolaco/manual:q=0.7,v=dense,two_sided/bayesian:spectral+blocks", "keep", ["factors", "refit"])
    assert [str(way) for way in ways] == [
        "svd",
        "bolaco/manual:q=0.7,v=dense",
        "two_sided/bayesian:spectral+blocks",
        "svd+refit+factors",
        "bolaco/manual:q=0.7,v=dense+refit+factors",
    ]
    assert {way.method for way in read_ways("all", "bits")} == {"quantize", "caldera", "mixed"}
    assert {"svd", "bolaco", "two_sided"} <= {way.method for way in read_ways("all", "keep")}
    assert read_sizes("90MB, 1GB", "size") == (90e6, 1e9)
    for bad, says in (("svdd", "did you mean 'svd'"), ("svd/unifrm", "'uniform'"), ("svd+blok", "'blocks'")):
        with pytest.raises(RecipeError, match=says):
            Way.parse(bad)
    with pytest.raises(RecipeError, match="no size"):
        read_sizes("0.8,x", "keep")
    with pytest.raises(RecipeError, match="of each way"):
        comparison_from(
            {
                "model": "m",
                "output": "o",
                "spelling": "keep",
                "sizes": (0.8,),
                "ways": ways,
                "texts": [{"source": "bundled"}],
                "settings": {"method": "svd"},
            }
        )


def test_settings_of_a_method_reach_it_alone() -> None:
    comparison = comparison_from(
        {
            "model": "m",
            "output": "o",
            "spelling": "bits",
            "sizes": (2.5,),
            "ways": read_ways("caldera,quantize", "bits"),
            "texts": [{"source": "bundled"}],
            "settings": {"methods": {"caldera": {"outer": 3}}, "calibration": {"sequences": 7}},
        }
    )
    first, second = (comparison.recipe(way, 2.5, 4) for way in comparison.ways)
    assert (first.method.name, first.method.outer) == ("caldera", 3)  # type: ignore[union-attr]
    assert second.method.name == "quantize"
    assert first.calibration.sequences == second.calibration.sequences == 7
    assert first.seed == 4
    assert (first.budget.bits, first.budget.keep) == (2.5, None)


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("bolaco/bayesian:5x1+subspace", "Bolaco 5x1"),
        ("bolaco/manual:q=0.7", "LoRD's"),
        ("afm/manual:q=0.7", "LoRD, with"),
        ("svd/uniform", "SVD"),
        ("two_sided", ""),
        ("dense", ""),
    ],
)
def test_rows_say_what_they_may_be_put_beside(way: str, found: str) -> None:
    published = ComparedRow(key="k", way=way).published
    assert published.startswith(found) if found else not published


def test_the_command_compares(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    options = ["--methods", "svd", "--calibration", f"text:{text}", "--evaluation", f"text:{text}"]
    options += ["--sequences", "4", "--scored", "2", "--length", "32", "--run-dir", tmp_path / "run"]
    status, out, error = rankwise("compare", tiny, "-o", tmp_path / "c", "--keep", "0.8", *options)
    assert status == 0, error
    assert "svd" in out
    assert {file.name for file in (tmp_path / "c").iterdir()} == {
        *(f"comparison.{kind}" for kind in ("json", "csv", "md", "html")),
        "rows.jsonl",
    }
    for changes, says in (
        (["--keep", "0.8", "--bits", "3"], "spelled in one way"),
        ([], "spelled in one way"),
        (["--keep", "0.8", "--repair", "block"], "'blocks'"),
        (["--keep", "0.8", "--set", "budget.rank_multipel=1"], "'rank_multiple'"),
        (["--keep", "0.8", "--tasks", "locl"], "'local'"),
    ):
        status, _, error = rankwise("compare", tiny, "-o", tmp_path / "d", *changes, *options)
        assert status == 2
        assert says in error
    status, out, _ = rankwise("compare", tiny, "-o", tmp_path / "none", "--keep", "0.0001", *options)
    assert status == 2
    assert "Nothing fits" in out
    # Of another model, and not replaced.
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    status, _, error = rankwise("compare", other, "-o", tmp_path / "c", "--keep", "0.8", *options)
    assert status == 2
    assert "--overwrite" in error


def test_repairs_are_tried_where_they_are_known() -> None:
    """What gives codes, or weights that lost units, has no row with a repair; `pruned` has one for a fraction kept."""
    repaired = [way.method for way in read_ways("pruned,two_sided,flap", "keep", ("blocks",)) if way.repair]
    assert repaired == ["pruned", "two_sided"]
    assert not [way for way in read_ways("pruned,mixed", "bits", ("blocks",)) if way.repair]
