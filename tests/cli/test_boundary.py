"""Whatever a command ends with is text for a person and a status: nothing foreseen or not shows a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, failed
from rankwise import cli
from rankwise.cli import boundary
from rankwise.cli.common import reporter_for
from rankwise.errors import RankwiseError
from rankwise.stages import fitting


@pytest.fixture
def compress(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> Run:
    def run(*words: Any, output: Any = None) -> tuple[int, str, str]:
        base = ["--calibration", f"text:{text}", "--sequences", 12, "--length", 32, "--run-dir", tmp_path / "run"]
        return rankwise(
            "compress", tiny, "-o", output or tmp_path / "out", "--method", "svd", "--keep", 0.6, *base, *words
        )

    return run


def breaking(*_arguments: Any, **_options: Any) -> Any:
    raise KeyError("nobody\nforesaw this")


def test_what_nobody_foresaw_names_stage_and_architecture_and_leaves_a_file(
    compress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit_sites", breaking)
    monkeypatch.setattr("rankwise.stages.fit_sites", breaking)
    status, out, err = compress("--quiet")
    assert (status, out) == (boundary.UNFORESEEN, "")
    assert "Traceback" not in err
    assert "KeyError" in err
    assert "stage fits, architecture LlamaForCausalLM" in err
    (file,) = (tmp_path / "run").glob("rankwise-error-*.txt")
    assert str(file) in err
    details = file.read_text()
    for each in (
        "Traceback",
        "in breaking",
        "command: ['rankwise', 'compress'",
        "stage: fits",
        "torch: ",
        "rankwise: ",
    ):
        assert each in details


def test_before_a_model_is_loaded_its_config_says_the_architecture(
    compress: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("rankwise.checkpoints.load_model", breaking)
    status, _, err = compress()
    assert status == boundary.UNFORESEEN
    assert "stage load, architecture LlamaForCausalLM" in err
    assert len(list(tmp_path.glob("rankwise-error-*.txt"))) == 1


def test_where_no_file_can_be_written_the_place_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nowhere"))
    reporter_for(True)
    assert boundary.run_guarded(breaking) == boundary.UNFORESEEN
    err = capsys.readouterr().err
    assert "no file could be written (breaking, line" in err
    assert "before the first stage" in err


def raising(problem: BaseException) -> Any:
    def command() -> None:
        raise problem

    return command


@pytest.mark.parametrize(
    ("problem", "status", "says"),
    [
        (RankwiseError("bad", where="here"), 2, "error: bad\n  where: here"),
        (OSError(28, "No space left on device", "/x/y"), 2, "disk is full"),
        (MemoryError(), 70, "free memory"),
        (RuntimeError("CUDA out of memory. Tried"), 70, "free memory"),
        (RecursionError("maximum"), 70, "did not foresee"),
        (RuntimeError(""), 70, "RuntimeError: RuntimeError"),
        (RankwiseError("steers \x1b[2J \ud800 the terminal"), 2, "steers \ufffd[2J \ufffd the terminal"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit(130), 130, "stopped"),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("text"), 1, ""),
    ],
)
def test_every_end_has_its_status(
    problem: BaseException, status: int, says: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    reporter_for(True)
    assert boundary.run_guarded(raising(problem)) == status
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert bool(err) == bool(says)


def test_a_request_to_end_says_where_to_go_on(capsys: Any) -> None:
    reporter_for(True).facts["run directory"] = "/some/run"
    before = signal.getsignal(signal.SIGTERM)
    assert boundary.run_guarded(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "finished in /some/run" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_it_without_a_word() -> None:
    command = f"{sys.executable} -m rankwise.cli --version"
    shell = f"set -o pipefail; (sleep 0.1; {command}; echo status $? >&2) | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={**os.environ})
    assert done.stderr.split() in (["status", "1"], ["status", "141"]), done.stderr


def test_names_are_no_markup(compress: Run, tmp_path: Path) -> None:
    status, out, err = compress(output=tmp_path / "o[/x]:smile:[bold]")
    assert status == 0, err
    assert f"written to {tmp_path}/o[/x]:smile:[bold]" in out


def test_names_that_no_file_system_takes_are_refused_before_anything_is_read(
    compress: Run, rankwise: Run, tmp_path: Path
) -> None:
    failed(compress(output=tmp_path / ("o" * 300)), "longer than a file system takes")
    failed(compress(output=tmp_path / ("o" * 240)), "longer than a file system takes")
    failed(compress("--recipe", "r" * 300), "no ready recipe")
    failed(compress("--recipe", tmp_path), "cannot be read", "directory")
    failed(compress("--plan", "p" * 300), "plan cannot be read", "too long")
    failed(compress("--evaluation", "text:" + "t" * 300), "longer than a file system takes")
    failed(rankwise("evaluate", "m" * 300, "--text", "bundled"), "longer than a file system takes")
    failed(rankwise("plan", "show", tmp_path), "plan cannot be read")
    failed(rankwise("finetune", "m", "--data", "text:x", "-o", "o" * 300), "longer than a file system takes")


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("method:\nbudget:\nrepair: {steps: }\n", [], ""),
        ("budget:\n", ["--set", "budget.keep=0.7"], ""),
        ("method:\n", ["--set", "method.bias=true"], ""),
        ("evaluation:\n", [], ""),
        ("a: &a [*a]\n", [], "holds itself"),
        ("seed: 2026-01-01\n", [], "seed"),
        ("seed: -1\n", [], "seed"),
        ("", [], "not a mapping"),
        ("budget: 3\n", ["--set", "budget.keep=0.7"], "holds a value"),
        ("seed: 1\n", ["--set", "name=x"], "'name' is no key"),
        ("seed: 1\n", ["--set", "repair.steps="], ""),
        ("seed: 1\n", ["--set", "repair.steps=3"], "repairs are named"),
        ("seed: 1\n", ["--set", "repair.steps=[[1]]"], "no repair"),
        ("seed: 1\n", ["--set", "=3"], "key=value"),
        ("seed: 1\n", ["--set", "a..b=3"], "key is empty"),
        ("seed: 1\n", ["--set", "method.name.x=3"], "holds a value"),
        ("allocation: [1]\n", ["--trials", "5"], "neither a name nor keys"),
        ("seed: 1\n", ["--set", "budget.keep=.nan"], "no finite number"),
    ],
)
def test_recipes_and_overrides_of_every_form_are_taken_or_explained(
    recipe: str, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, rankwise: Run, tmp_path: Path
) -> None:
    def stops(valid: Any, **_options: Any) -> Any:
        raise RankwiseError("the recipe was valid")

    monkeypatch.setattr("rankwise.flows.compress.compress", stops)
    (tmp_path / "r.yaml").write_text(recipe)
    failed(
        rankwise("compress", "M", "-o", "O", "--recipe", tmp_path / "r.yaml", *words), says or "the recipe was valid"
    )


def test_a_recipe_alone_may_not_run_code(rankwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = []

    def stops(valid: Any, **_options: Any) -> Any:
        trusted.append(valid.trust_remote_code)
        raise RankwiseError("the recipe was valid")

    monkeypatch.setattr("rankwise.flows.compress.compress", stops)
    monkeypatch.setattr("rankwise.flows.sensitivity.sensitivity", stops)
    (tmp_path / "r.yaml").write_text("model: M\ntrust_remote_code: true\n")
    words = ["compress", "-o", "O", "--recipe", tmp_path / "r.yaml"]
    failed(rankwise(*words), "asks to run code", "add --trust-remote-code")
    failed(rankwise("compress", "M", "-o", "O", "--set", "trust_remote_code=true"), "asks to run code")
    failed(rankwise("compress", "M", "-o", "O", "--set", "trust_remote_code=1"), "asks to run code")
    failed(rankwise("sensitivity", "M", "-o", "O", "--set", "trust_remote_code=true"), "asks to run code")
    assert trusted == []
    failed(rankwise(*words, "--trust-remote-code"), "the recipe was valid")
    failed(rankwise("compress", "M", "-o", "O"), "the recipe was valid")
    assert trusted == [True, False]


def test_typer_shows_no_traceback_of_its_own() -> None:
    assert cli.app.pretty_exceptions_enable is False
