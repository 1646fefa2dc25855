"""The package: light to import, self-contained where it has to be, quickstart model that has learnt something."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from rankwise.checkpoints.modeling_file import modeling_source
from rankwise.progress import Reporter


def test_importing_rankwise_loads_nothing_heavy() -> None:
    code = "import sys, rankwise; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "ray", "botorch", "lm_eval", "matplotlib", "datasets", "pyarrow"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_using_rankwise_loads_no_optional_package() -> None:
    code = "import sys, rankwise.stages, rankwise.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    optional = ["ray", "botorch", "lm_eval", "matplotlib", "datasets", "pyarrow"]
    done = subprocess.run([sys.executable, "-c", code, *optional], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compress_is_a_function_whatever_was_imported_first() -> None:
    code = "import rankwise.quickstart, rankwise; from rankwise import compress; assert callable(compress)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_modelling_file_imports_torch_and_transformers_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    tree = ast.parse(modeling_source(LlamaConfig, LlamaModel, LlamaForCausalLM, "model"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_the_bundled_model_is_small_and_has_learnt_something(bundled: Path) -> None:
    facts = json.loads((bundled / "training.json").read_text())
    assert (bundled / "model.safetensors").stat().st_size <= 6e6
    assert 1e6 <= facts["parameters"] <= 3e6
    assert facts["heldout_perplexity"] * 5 <= facts["heldout_unigram_perplexity"]


_SIZES = ("linear weights kept", "linear parameters", "linear bytes", "parameters ", "bytes ")


@pytest.mark.long
def test_the_quickstart_compresses_the_bundled_model(tmp_path: Path, capsys: object) -> None:
    from rankwise.quickstart import run

    run(tmp_path / "out", 0.8, Reporter(show=False))
    out = capsys.readouterr().out  # type: ignore[attr-defined]
    report = json.loads((tmp_path / "out" / "rankwise_report.json").read_text())
    dense, small = (report["evaluation"][which]["perplexity"] for which in ("dense", "compressed"))
    assert 10 < dense < small < 1.15 * dense
    assert f"{dense:.3f}" in out
    assert f"{small:.3f}" in out
    assert out.count("Return a list of") == 2
    sizes = [line.rstrip() for line in out.splitlines() if line.startswith(_SIZES)]
    assert len(sizes) == 5
    # Columns are as wide as what else stands in them, such as the memory of a process that did other things before.
    page = [" ".join(line.split()) for line in (ROOT / "README.md").read_text().splitlines()]
    assert [" ".join(line.split()) for line in sizes] == [line for line in page if line.startswith(_SIZES)]


def test_notes_are_said_once_and_kept(capsys: object) -> None:
    reporter = Reporter()
    reporter.note("something")
    reporter.note("something")
    assert reporter.notes == ["something"]
    assert capsys.readouterr().err == "note: something\n"  # type: ignore[attr-defined]


def test_a_stage_is_timed_even_when_it_fails() -> None:
    reporter = Reporter(show=False)
    try:
        with reporter.stage("fails"):
            raise KeyError
    except KeyError:
        pass
    assert reporter.stages["fails"].peak_memory_bytes > 0


def test_progress_passes_every_item_through() -> None:
    for show in (False, True):
        assert list(Reporter(show=show).track(range(5), "counting", total=5)) == list(range(5))


def test_seeds_do_not_leak() -> None:
    """Nothing here draws from the global generator."""
    from rankwise.data import choose

    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    choose(torch.arange(9)[:, None], 3, 5)
    assert torch.equal(first, torch.rand(1))
