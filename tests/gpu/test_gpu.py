"""The same models come out of a GPU as out of a CPU: every method, way to hold a model, search, repair and training.

`make test-gpu` runs these and no others, on the first GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ELSEWHERE, IDS, Run
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.evaluation import generate
from rankwise.flows.finetune import finetune
from rankwise.methods import FACTORISATIONS
from rankwise.methods.two_sided import TwoSided
from rankwise.quantizers.lattice import decode_e8p, round_e8p
from rankwise.recipes import TRAININGS, FineTune, recipe_from
from rankwise.recipes.comparison import QUANTISING
from rankwise.recipes.compression import STEPS
from rankwise.reports import Report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

ON_GPU = {"device": "cuda", "precision": "float32"}
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def bundled_settings(bundled: Path) -> Settings:
    """A short run on the bundled model, with changes on top."""

    def make(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model": str(bundled),
            "budget": {"keep": 0.7},
            "calibration": {"source": "bundled:train", "sequences": 24, "length": 64},
            "validation": {"source": "bundled:train", "skip": 64, "sequences": 8, "length": 64},
            "evaluation": {"source": "bundled:heldout", "sequences": 16, "length": 64, "speed": False},
            **ON_GPU,
        }
        return {**base, **changes}

    return make


@pytest.fixture
def coded(settings: Settings) -> Settings:
    """A run of few bits on the tiny model, with changes on top: codes are slow to find on the CPU that is compared."""

    def make(**changes: Any) -> dict[str, Any]:
        return settings(**{"method": "quantize", "budget": {"bits": 2.5}, **ON_GPU, **changes})

    return make


def report_of(values: dict[str, Any]) -> Report:
    """Of a run that takes nothing over from another."""
    with tempfile.TemporaryDirectory() as folder:
        return compress(recipe_from(values), run_directory=folder).report


def perplexity(values: dict[str, Any]) -> float:
    """Of what a recipe makes."""
    found = report_of(values).evaluation
    assert found is not None
    return found.compressed.perplexity


def mean_error(values: dict[str, Any]) -> float:
    """Of the sites of what a recipe makes, tr(E H E^T) / tr(W H W^T)."""
    errors = [site.error for site in report_of(values).sites.values() if site.error is not None]
    assert errors
    return sum(errors) / len(errors)


@pytest.mark.parametrize("method", FACTORISATIONS)
def test_factors_are_those_of_a_cpu(method: str, bundled_settings: Settings) -> None:
    values = bundled_settings(method=method)
    assert perplexity(values) == pytest.approx(perplexity({**values, "device": "cpu"}), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codewords_are_as_near_as_those_of_a_cpu(bits: int) -> None:
    x = 1.3 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    here, there = (decode_e8p(round_e8p(each, bits)[:, None]).cpu() for each in (x, x.cuda()))
    assert float((x - there).norm(dim=1).mean()) == pytest.approx(float((x - here).norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("method", QUANTISING)
def test_codes_are_as_good_as_those_of_a_cpu(method: str, coded: Settings) -> None:
    own = method if method == "quantize" else {"name": method, "outer": 2}
    values = coded(method=own)
    assert mean_error(values) == pytest.approx(mean_error({**values, "device": "cpu"}), rel=0.05)


def test_the_checkpoints_own_precision_costs_little(bundled_settings: Settings) -> None:
    """`auto` computes in the checkpoint's bfloat16 on a GPU."""
    assert perplexity(bundled_settings(precision="auto")) == pytest.approx(perplexity(bundled_settings()), rel=0.02)


@pytest.mark.parametrize("memory", ["blocks", "disk"])
def test_models_in_files_come_out_alike(memory: str, bundled_settings: Settings, tmp_path: Path) -> None:
    values = bundled_settings()
    streamed = perplexity({**values, "memory": memory, "output": str(tmp_path / "out")})
    assert streamed == pytest.approx(perplexity({**values, "memory": "whole"}), rel=0.002)
    assert load_model(str(tmp_path / "out"), device=torch.device("cuda")).model.device.type == "cuda"


@pytest.mark.parametrize("memory", ["blocks", "disk"])
def test_models_in_files_get_the_same_codes(memory: str, coded: Settings) -> None:
    assert mean_error(coded(memory=memory)) == pytest.approx(mean_error(coded(memory="whole")), rel=0.02)


def test_what_a_gpu_has_no_memory_for_is_made_on_the_cpu(
    bundled_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = bundled_settings()
    expected = perplexity(values)
    outlook, seen = TwoSided.outlook, []

    def out_of_memory(self: TwoSided, weight: torch.Tensor, *rest: Any) -> Any:
        seen.append(weight.device.type)
        if weight.is_cuda and len(seen) % 3 == 0:
            raise torch.OutOfMemoryError("no memory left")
        return outlook(self, weight, *rest)

    monkeypatch.setattr(TwoSided, "outlook", out_of_memory)
    assert perplexity(values) == pytest.approx(expected, rel=0.001)
    assert {"cuda", "cpu"} == set(seen)


@pytest.mark.parametrize("space", ["5x1", "spectral"])
def test_a_search_judges_all_its_plans(space: str, bundled_settings: Settings) -> None:
    values = bundled_settings(allocation={"name": "bayesian", "space": space, "trials": 12}, method="two_sided")
    search = report_of(values).search
    assert search is not None
    assert (search.trials, search.failed) == (12, 0)
    assert 0 < search.objective.kl < 3


@pytest.mark.parametrize("step", STEPS)
def test_repairs_are_those_of_a_cpu(step: str, bundled_settings: Settings) -> None:
    values = bundled_settings(method="bolaco", repair={"steps": [step]})
    assert perplexity(values) == pytest.approx(perplexity({**values, "device": "cpu"}), rel=0.02)


@pytest.mark.parametrize("method", TRAININGS)
def test_every_training_is_written_and_loads_elsewhere(
    method: str, settings: Settings, coded: Settings, tmp_path: Path
) -> None:
    small = str(tmp_path / "small")
    own = coded(method={"name": "caldera", "outer": 1}, budget={"bits": 4.0}, output=small)
    compress(recipe_from(own if method == "lowrank" else settings(output=small, method="two_sided", **ON_GPU)))
    lines = ({"instruction": f"return {i}", "input": "", "output": "the object of a list " * 3} for i in range(24))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = FineTune(
        model=small,
        data=f"alpaca:{tmp_path / 'data.jsonl'}",
        output=str(tmp_path / "tuned"),
        method=method,
        device="cuda",
        held_out=4,
        length=64,
    )
    finetune(wanted)
    loaded = load_model(str(tmp_path / "tuned"), precision="stored")
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([IDS])).logits
    torch.save(logits, tmp_path / "logits.pt")
    words = [str(tmp_path / "tuned"), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bits", [2.5, 3.5, 4.5])
def test_codes_mean_the_same_on_both(bits: float, coded: Settings, tmp_path: Path) -> None:
    compress(recipe_from(coded(budget={"bits": bits}, output=str(tmp_path / "out"))))
    ids = torch.tensor([IDS])
    found = []
    for device in ("cpu", "cuda"):
        loaded = load_model(str(tmp_path / "out"), precision="float32", device=torch.device(device))
        with torch.no_grad():
            found.append(loaded.model(input_ids=ids.to(device)).logits.cpu())
        assert generate(loaded.model, loaded.tokenizer, "Return a", new_tokens=8).strip()
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)


def test_the_commands_work(rankwise: Run, bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, _, err = rankwise("compress", bundled, "-o", out, "--sequences", 16, "--length", 64, "--device", "cuda")
    assert status == 0, err
    for words in (
        ("evaluate", out, "--text", "bundled:heldout", "--length", 64, "--sequences", 8, "--against", bundled),
        ("speed", out, "--against", bundled, "--rounds", 2, "--tokens", 8, "--prompt", 16),
        ("generate", out, "--prompt", "Return a", "--new-tokens", 4),
    ):
        status, _, err = rankwise(*words, "--device", "cuda")
        assert status == 0, err
    words = ("--keep", "0.7", "--methods", "svd,two_sided", "--evaluation", "bundled:heldout", "--length", 64)
    status, _, err = rankwise("compare", bundled, "-o", tmp_path / "compared", *words, "--device", "cuda")
    assert status == 0, err
