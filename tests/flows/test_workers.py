"""Workers on Ray: the same result as one process, also when they die."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run, failed
from rankwise import compress
from rankwise.checkpoints import fingerprint, load_model
from rankwise.errors import ModelError, NotFiniteError, RankwiseError, RecipeError, RunError
from rankwise.flows.compare import compare
from rankwise.progress import Reporter
from rankwise.recipes import comparison_from, recipe_from
from rankwise.runs import Done, Here, Job
from rankwise.stages import crews, jobs, read_texts

pytestmark = [pytest.mark.filterwarnings("ignore")]

KINDS = ("measure_shard", "estimate_losses", "look_at", "judge_cuts", "fit_codes")
SEARCHED: dict[str, Any] = {
    "method": "quantize",
    "allocation": {"name": "bayesian", "space": "spectral", "trials": 13},
    "budget": {"bits": 3.0, "rank_multiple": 1},
    "validation": {"sequences": 4},
}


def open_nothing(root: Path, number: int, reporter: Reporter, *, word: str) -> dict[str, Any]:
    reporter.note(f"worker {number} says {word}")
    return {"root": root, "word": word}


def square(held: dict[str, Any], out: Path, *, number: int, marks: str = "") -> int:
    if marks and not (Path(marks) / str(number)).exists():
        (Path(marks) / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (out / "word").write_text(held["word"] * number)
    return number * number


def refuse(_held: Any, _out: Path) -> None:
    raise NotFiniteError("It is NaN.", where="here", remedy="do that")


def die(_held: Any, _out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def open_dying(root: Path, number: int, reporter: Reporter, *, marks: str, kinds: list[str], **arguments: Any) -> Any:
    """A hand that kills its process the first time that any worker does a job of each kind."""
    for kind in kinds:
        real, mark = getattr(jobs, kind), Path(marks) / kind

        def dying(*given: Any, real: Any = real, mark: Path = mark, **named: Any) -> Any:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        setattr(jobs, kind, dying)
    return jobs.open_hand(root, number, reporter, **arguments)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    here = Path(__file__).parent
    known = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, *sys.path)))}
    os.environ.update(known)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    del os.environ["PYTHONPATH"]
    yield
    ray.shutdown()


class Two(Here):
    """This process, and as many plans begun at a time as two workers have."""

    workers = 2

    def results(self, given: Iterable[Job], ahead: int | None = None) -> Iterator[Done]:
        waiting: list[Done] = []
        for job in given:
            for done in super().results([job]):
                waiting.append(
                    Done(done.value, {name: Path(str(path)).read_bytes() for name, path in done.files.items()})
                )
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting


def same(one: Any, other: Any) -> None:
    assert one.plan.cuts == other.plan.cuts
    found = other.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.long
def test_jobs_come_back_in_order_from_workers_that_die(cluster: None, tmp_path: Path) -> None:
    from rankwise.runs.on_ray import Opening, RayCrew

    reporter = Reporter(show=False)
    (tmp_path / "marks").mkdir()
    opening = Opening("test_workers:open_nothing", {"word": "ha"})
    with RayCrew("", 2, opening, tmp_path, reporter) as crew:
        assert sorted(reporter.notes) == ["worker 1 says ha", "worker 2 says ha"]
        taken: list[int] = []

        def some() -> Iterator[Job]:
            for number in range(6):
                taken.append(number)
                marks = str(tmp_path / "marks") if number == 3 else ""
                yield Job("test_workers:square", {"number": number, "marks": marks})

        for number, done in enumerate(crew.results(some())):
            assert len(taken) <= number + 2
            assert done.value == number * number
            done.put("word", tmp_path / "word")
            assert (tmp_path / "word").read_text() == "ha" * number
        assert [note for note in reporter.notes if "died" in note] != []
        with pytest.raises(NotFiniteError) as found:
            list(crew.results([Job("test_workers:refuse")]))
        assert (found.value.problem, found.value.where, found.value.remedy) == ("It is NaN.", "here", "do that")
        with pytest.raises(RunError, match="3 workers died of one job"):
            list(crew.results([Job("test_workers:die")]))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".seen")) == []
    with pytest.raises(RunError, match="9 workers were asked for, and the cluster has 2 cores"):
        RayCrew("", 9, opening, tmp_path, reporter)


@pytest.mark.long
@pytest.mark.parametrize(
    "kinds", [("judge_cuts",), pytest.param(KINDS, marks=pytest.mark.slow)], ids=["one kind", "every kind"]
)
def test_a_search_by_workers_that_die_is_that_of_this_process(
    kinds: tuple[str, ...],
    cluster: None,
    settings: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rankwise.runs import on_ray

    with monkeypatch.context() as two:
        two.setattr(crews, "Here", Two)
        here = compress(recipe_from(settings(**SEARCHED)), run_directory=tmp_path / "here")
    real = on_ray.Opening

    def opening(_function: str, arguments: dict[str, Any]) -> Any:
        (tmp_path / "marks").mkdir(exist_ok=True)
        more = {"marks": str(tmp_path / "marks"), "kinds": list(kinds)}
        return real("test_workers:open_dying", {**arguments, **more})

    monkeypatch.setattr(on_ray, "Opening", opening)
    recipe = recipe_from({**settings(**SEARCHED), "executor": "ray", "workers": 2})
    there = compress(recipe, run_directory=tmp_path / "there")
    assert sorted(path.name for path in (tmp_path / "marks").iterdir()) == sorted(kinds)
    same(here, there)
    assert here.report.search is not None
    assert there.report.search is not None
    assert there.report.search.objective.value == pytest.approx(here.report.search.objective.value, rel=1e-6)
    assert not [path for path in (tmp_path / "there").iterdir() if path.name.startswith((".work", ".seen", "shard"))]


@pytest.mark.long
def test_workers_that_do_not_see_the_run_directory_give_the_same(
    cluster: None, settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.runs.on_ray import RayCrew

    values = settings(method="two_sided", allocation="spectral")
    here = compress(recipe_from(values), run_directory=tmp_path / "here")
    monkeypatch.setattr(RayCrew, "_mark", lambda _self: None)
    shared: list[bool] = []
    real = RayCrew._open

    def seeing(self: Any, begun: Any, number: int) -> Any:
        hand = real(self, begun, number)
        shared.append(hand.shared)
        return hand

    monkeypatch.setattr(RayCrew, "_open", seeing)
    there = compress(recipe_from({**values, "executor": "ray", "workers": 2}), run_directory=tmp_path / "there")
    assert shared == [False, False]
    same(here, there)


@pytest.mark.long
def test_rows_of_a_comparison_by_workers_are_those_of_this_process(
    cluster: None, settings: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    base = settings()
    asked = {
        "model": base["model"],
        "spelling": "keep",
        "sizes": [0.6, 0.01],
        "ways": [{"method": "svd"}, {"method": "bolaco"}],
        "texts": [{"source": f"text:{text}", "length": 32, "sequences": 8}],
        "settings": {"calibration": base["calibration"], "budget": {"rank_multiple": 1}},
    }
    rows = []
    for executor in ("here", "ray"):
        comparison = comparison_from({**asked, "output": str(tmp_path / executor)})
        found = compare(comparison, run_directory=tmp_path / f"run-{executor}", executor=executor, workers=2)
        rows.append([row.model_dump(exclude={"seconds"}) for row in found.rows])
    assert len(rows[0]) == 5
    assert [bool(row.get("problem")) for row in rows[0]] == [False, False, False, True, True]
    assert rows[0] == rows[1]


def test_what_workers_cannot_do_is_refused(rankwise: Run, settings: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match="flap takes units out of a model in one process"):
        recipe_from(settings(method="flap", executor="ray"))
    with pytest.raises(RecipeError, match="executor"):
        recipe_from(settings(executor="dask"))
    with pytest.raises(RecipeError, match="add executor ray"):
        recipe_from(settings(workers=2))
    failed(rankwise("compress", "nowhere", "-o", "out", "--executor", "rya"), "executor")
    failed(rankwise("compare", "nowhere", "-o", "out", "--keep", "0.5", "--workers", "2"), "add executor ray")
    few = ("--executor", "ray", "--workers", "-1")
    failed(rankwise("compare", "nowhere", "-o", "out", "--keep", "0.5", *few), "workers")
    failed(rankwise("compare", "nowhere", "-o", "out", "--keep", "0.5", "--executor", "rya"), "executor")
    failed(rankwise("compare", "nowhere", "-o", "out", "--keep", "0.5", "--set", "executor=ray"), "give --executor")


def opened(values: dict[str, Any], root: Path, mark: str | None = None) -> jobs.Hand:
    """What a worker begins with, in this process, where the run's weights have this hash."""
    recipe = recipe_from(values)
    loaded = load_model(recipe.model)
    texts = read_texts(recipe, loaded, Reporter(show=False), validate=False)
    mark = mark or fingerprint(loaded.model, loaded.stored_dtypes)
    asked = {"recipe": recipe.model_dump(mode="json"), "texts": texts, "memory": "whole", "fingerprint": mark}
    return jobs.open_hand(root, 1, Reporter(show=False), **asked)


def test_a_worker_that_finds_other_weights_says_so(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="A worker found other weights"):
        opened(settings(), tmp_path, "another")


def test_a_shard_goes_on_from_what_was_left_of_the_same_sums_alone(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Path] = []

    def nothing(*_: Any, snapshot: Path, **__: Any) -> Iterator[Any]:
        left.append(snapshot)
        return iter(())

    monkeypatch.setattr(jobs, "collecting", nothing)
    base = settings()["calibration"]
    for changes in ({}, {}, {"seed": 1}, {"calibration": {**base, "batch_size": 4}}):
        hand = opened(settings(method="two_sided", **changes), tmp_path)
        jobs.measure_shard(hand, tmp_path, numbers=[0], first=0, stop=8)
    jobs.measure_shard(hand, tmp_path, numbers=[0], first=8, stop=16)
    assert left[0] == left[1]
    assert len(set(left)) == 4


def test_without_ray_workers_are_refused(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RankwiseError, match="Workers need Ray"):
        compress(recipe_from(settings(executor="ray")), run_directory=tmp_path / "run")
