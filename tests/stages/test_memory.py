"""What a run is expected to need comes from its config alone, and decides how a model is held."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from conftest import Run, make_site
from rankwise import compress
from rankwise.errors import ModelError
from rankwise.models import BlockRunner
from rankwise.progress import Reporter, StageTime, anonymous_bytes
from rankwise.recipes import recipe_from
from rankwise.stages import memory
from rankwise.stages.finish import _memory
from rankwise.stages.memory import expected_need, needs, require_config, shapes_of

WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """The config of two blocks as wide as those of a model of 70 billion parameters; no weights."""
    LlamaConfig(**WIDE, num_hidden_layers=2, vocab_size=128_256, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_config_is_all_that_is_read(wide: Path) -> None:
    recipe = recipe_from({"model": str(wide), "calibration": {"sequences": 8}, "device": "cpu"})
    shapes = shapes_of(recipe)
    linear = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert sum(site.parameters for site in shapes.sites) == linear
    assert shapes.outside == 2 * 128_256 * 8192 + 8192
    assert (shapes.stored, shapes.computed, shapes.gradients) == (2, 4, 8)
    # q, k and v read one input, gate and up another: 2 + 1 matrices of 8192^2, and the output of down.
    inputs = 4 * (3 * 8192**2 + 8192**2 + 4 * 2 * 8192)
    assert shapes.sums[0] > inputs
    found = needs(shapes)
    largest_block = max(shapes.blocks)
    assert found["whole"].host - found["blocks"].host == 4 * (linear + shapes.outside + 4 * 8192 - largest_block)
    assert found["blocks"].host >= found["disk"].host
    assert found["whole"].disk < found["blocks"].disk <= found["disk"].disk
    assert all(need.device == 0 for need in found.values())


def test_hidden_states_beyond_what_memory_keeps_are_counted_as_files(wide: Path) -> None:
    def need(sequences: int) -> tuple[int, int]:
        values = {"model": str(wide), "calibration": {"sequences": sequences, "length": 512}, "device": "cpu"}
        # No weight is large enough to hide it.
        found = needs(replace(shapes_of(recipe_from(values)), sites=[make_site("0.q", 4, 4)]))
        return found["blocks"].host - found["disk"].host, found["disk"].disk - found["blocks"].disk

    # What passes, what lies below, between and above two blocks, and the gradient on its way down.
    hidden = 4 * 8 * 512 * 8192 * (1 + 3 + 1)
    assert need(8) == (hidden, hidden)
    assert need(256) == (0, 0)


def test_what_becomes_of_the_vocabulary_is_counted(wide: Path) -> None:
    def need(**keys: Any) -> Any:
        recipe = recipe_from({"model": str(wide), "calibration": {"sequences": 8}, "device": "cpu", **keys})
        # Nothing else is large enough to hide it.
        return needs(replace(shapes_of(recipe), sites=[make_site("0.q", 4, 4)], sums=[0, 0], batch=1))

    plain, coded, factored = need(), need(embeddings="8bit"), need(head="low-rank:0.5")
    scales = 128_256 * 2
    assert plain["disk"].disk - coded["disk"].disk == 128_256 * 8192 - scales
    rank = 0.5 * 128_256 * 8192 // (128_256 + 8192) // 8 * 8
    assert plain["disk"].disk - factored["disk"].disk == 2 * (128_256 * 8192 - rank * (128_256 + 8192))
    assert (plain["disk"].worst, factored["disk"].worst) == ("statistics", "head")
    assert factored["disk"].host > plain["disk"].host


@pytest.mark.parametrize(("free", "chosen"), [(10**15, "whole"), (22 * 10**9, "blocks"), (10**6, "disk")])
def test_auto_takes_the_first_that_fits(
    free: int, chosen: str, wide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    recipe = recipe_from({"model": str(wide), "calibration": {"sequences": 8}, "device": "cpu"})
    need = expected_need(recipe, Reporter())
    assert need is not None
    assert memory.chosen_memory(recipe, need) == need.mode == chosen
    said = capsys.readouterr().err
    assert f"memory: {chosen}, about" in said
    assert ("more than is free" in said) == (free < 10**9)
    asked = recipe.model_copy(update={"memory": "whole"})
    assert memory.chosen_memory(asked, expected_need(asked, Reporter(show=False))) == "whole"


def test_fused_experts_and_other_statistics_have_an_estimate(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for method in ("svd", "bolaco", "two_sided", "quantize", "caldera", "mixed"):
        budget = {"bits": 3} if method in ("quantize", "caldera", "mixed") else {}
        recipe = recipe_from({"model": str(tmp_path), "method": method, "budget": budget, "device": "cpu"})
        shapes = shapes_of(recipe)
        assert shapes.gradients == 6 * (method in ("two_sided", "quantize", "caldera", "mixed"))
        assert all(shapes.sums) == (method != "svd")
        assert sum(".experts." in site.name for site in shapes.sites) == 2 * 4 * 3
        assert all(need.host >= memory._LIBRARIES for need in needs(shapes).values())


def test_what_cannot_be_told_is_said_by_the_command_alone(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from({"model": str(wide / "nowhere"), "device": "cpu"})
    assert expected_need(recipe, Reporter(show=False)) is None
    assert memory.chosen_memory(recipe, None) == "whole"
    with pytest.raises(ModelError):
        require_config(recipe)

    def fails(_recipe: Any) -> None:
        raise IndexError("no such layer")

    monkeypatch.setattr(memory, "shapes_of", fails)
    with pytest.raises(ModelError, match="IndexError: no such layer"):
        require_config(recipe_from({"model": str(wide), "device": "cpu"}))


def test_the_command(rankwise: Run, wide: Path) -> None:
    status, out, _ = rankwise("plan-memory", str(wide), "--sequences", "8", "--device", "cpu")
    assert status == 0
    assert all(mode in out for mode in memory.MODES)
    status, out, _ = rankwise("plan-memory", str(wide), "--keep", "0.5", "--device", "cpu", "--json")
    found = json.loads(out)["needs"]
    assert status == 0
    assert found["whole"]["host"] > found["disk"]["host"]


def test_a_gpu_is_planned_for_where_there_is_none(wide: Path, rankwise: Run) -> None:
    shapes = shapes_of(recipe_from({"model": str(wide), "calibration": {"sequences": 8}, "device": "cuda"}))
    assert shapes.on_gpu
    # In the checkpoint's own type.
    assert (shapes.stored, shapes.computed) == (2, 2)
    found = needs(shapes)
    outside_of_largest = sum(shapes.blocks) - max(shapes.blocks)
    assert found["whole"].device - found["blocks"].device == 2 * outside_of_largest
    assert found["blocks"].device > 2 * (shapes.outside + max(shapes.blocks)) + max(shapes.sums)
    assert found["blocks"].host > memory._LIBRARIES_BESIDE_A_GPU
    status, out, _ = rankwise("plan-memory", str(wide), "--sequences", "8", "--device", "cuda:3", "--json")
    assert status == 0
    assert json.loads(out)["needs"]["blocks"]["device"] == found["blocks"].device
    status, _, said = rankwise("plan-memory", str(wide), "--device", "gpu")
    assert status == 2
    assert "use auto, cpu, cuda or mps" in said


def test_a_stage_says_what_it_took_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, held = Reporter(show=False), {0: 5, 1: 7}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with reporter.stage("without"):
        pass
    assert reporter.stages["without"].gpu_bytes is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", held.get)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda number: held.update({number: 0}))
    with reporter.stage("one"):
        held[1] = 3
    assert reporter.stages["one"].gpu_bytes == 3


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_run_reports_what_it_took_of_its_own_gpu(device: str) -> None:
    """A run on the CPU says nothing of what else its process holds on a GPU."""
    stages = {name: StageTime(1.0, 9, True, 5, gpu_bytes=most) for name, most in {"load": 3, "fits": 8}.items()}
    work: Any = SimpleNamespace(
        reporter=SimpleNamespace(stages=stages),
        loaded=SimpleNamespace(model=SimpleNamespace(device=torch.device(device))),
        need=SimpleNamespace(host=6, device=7),
        memory="blocks",
    )
    found = _memory(work).model_dump()
    on_gpu = {"gpu_expected_bytes": 7, "gpu_used_bytes": 8} if device == "cuda" else {}
    assert found == {"mode": "blocks", "expected_bytes": 6, "used_bytes": 5, **on_gpu}


@pytest.mark.parametrize("mode", ["auto", "disk"])
def test_the_report_says_what_was_expected_and_used(
    mode: str, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = compress(
        recipe_from(settings(memory=mode, method="svd", allocation="uniform")), run_directory=tmp_path / "run"
    )
    used = found.report.memory
    assert used is not None
    assert used.mode == ("whole" if mode == "auto" else mode)
    assert used.expected_bytes is not None
    if anonymous_bytes() is not None:
        assert used.used_bytes == max(stage.anonymous_bytes or 0 for stage in list(found.report.stages.values())[:-1])


def test_blocks_that_need_each_other_are_no_reason_to_fail(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockRunner, "alone", lambda _self: False)
    values = settings(memory="disk", budget={"keep": 0.6, "rank_multiple": 1})
    found = compress(recipe_from(values), run_directory=tmp_path / "run")
    monkeypatch.undo()
    assert found.plan == compress(recipe_from({**values, "memory": "whole"}), run_directory=tmp_path / "other").plan
