"""Checkpoints: they load without rankwise, bit for bit, and never half."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ELSEWHERE, IDS, tiny_llama
from rankwise import compress
from rankwise.checkpoints import REPORT_FILE, fingerprint, load_model
from rankwise.errors import OutputError
from rankwise.evaluation import measure_cost
from rankwise.layers import LowRankLinear
from rankwise.models import find_sites
from rankwise.recipes import recipe_from

Settings = Callable[..., dict[str, Any]]

TWO_FACTORS = {"keep": 0.6, "rank_multiple": 1, "storage": "two_factor"}


@pytest.mark.long
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_process_without_rankwise_gets_the_same_logits(
    tied: bool, dtype: torch.dtype, settings: Settings, tiny: Path, tmp_path: Path
) -> None:
    (tiny / "model.safetensors").unlink()
    tiny_llama(tie_word_embeddings=tied).to(dtype).save_pretrained(tiny)
    output = tmp_path / "out"
    result = compress(recipe_from(settings(output=str(output), max_shard_size="100KB")))
    assert len(list(output.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        logits = result.model(input_ids=torch.tensor([IDS])).logits
    assert logits.dtype == dtype
    torch.save(logits, tmp_path / "logits.pt")
    arguments = [str(output), str(tmp_path / "again"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
    stored = {name for file in output.glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in stored) is not tied


def test_the_directory_is_complete_and_sizes_are_true(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = compress(recipe_from(settings(output=str(output), budget=TWO_FACTORS)))
    names = {p.name for p in output.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "modeling_rankwise.py", "plan.json", "README.md",
        REPORT_FILE, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "rankwise_llama"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    report = json.loads((output / REPORT_FILE).read_text())
    tensors = load_file(output / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == report["after"]["parameters"]
    assert sum(t.nbytes for t in tensors.values()) == report["after"]["bytes"]
    factors = sum(t.numel() for name, t in tensors.items() if ".left.weight" in name or ".right.weight" in name)
    dense = sum(t.numel() for name, t in tensors.items() if name.endswith("_proj.weight"))
    assert factors + dense == report["after"]["linear_parameters"] == result.plan.kept_bits / 32
    assert report["after"]["linear_parameters"] <= 0.6 * report["before"]["linear_parameters"]
    assert report["biases_added"] == sum(t.numel() for name, t in tensors.items() if name.endswith(".left.bias"))
    assert report["bytes_on_disk"] == (output / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(output)("a list")["input_ids"]
    card = (output / "README.md").read_text()
    assert f"{report['after']['parameters']:,}" in card


def test_our_own_checkpoints_load_without_running_their_code(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(recipe_from(settings(output=str(output), budget=TWO_FACTORS)))
    (output / "modeling_rankwise.py").write_text("raise SystemExit('ran')")
    loaded = load_model(str(output))
    assert any(isinstance(m, LowRankLinear) for m in loaded.model.modules())


def test_a_compressed_model_is_not_compressed_again(settings: Settings, tmp_path: Path) -> None:
    from rankwise.errors import ModelError

    compress(recipe_from(settings(output=str(tmp_path / "out"))))
    with pytest.raises(ModelError, match="compressed already"):
        compress(recipe_from(settings(model=str(tmp_path / "out"))))


def test_the_dense_format_saves_no_size_and_needs_no_trust(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    small = compress(recipe_from(settings()))
    with torch.no_grad():
        expected = small.model(input_ids=torch.tensor([IDS])).logits
    compress(recipe_from(settings(output=str(output), format="dense")))
    plain = AutoModelForCausalLM.from_pretrained(output)
    assert type(plain).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=torch.tensor([IDS])).logits, expected, atol=1e-4, rtol=1e-4)
    sites = find_sites(plain)
    assert measure_cost(plain, sites, {}).linear_parameters == sum(s.parameters for s in sites)
    assert "No size is saved" in (output / "README.md").read_text()


def test_a_directory_of_somebody_elses_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by rankwise"):
        compress(recipe_from(settings(output=str(output))))
    assert (output / "thesis.tex").read_text() == "years of work"


def test_our_own_directory_is_replaced_whole(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress(recipe_from(settings(output=str(output), max_shard_size="20KB")))
    assert len(list(output.glob("*.safetensors"))) > 1
    compress(recipe_from(settings(output=str(output), budget={"keep": 0.5, "rank_multiple": 1})))
    assert json.loads((output / REPORT_FILE).read_text())["keep"]["asked"] == 0.5
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]


def test_a_full_disk_keeps_the_old_checkpoint_and_finished_stages(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    compress(recipe_from(settings(output=str(output))))
    before = (output / REPORT_FILE).read_bytes()

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.checkpoints.save.save_torch_state_dict", full)
    with pytest.raises(OutputError, match="disk is full"):
        compress(recipe_from(settings(output=str(output), budget={"keep": 0.5, "rank_multiple": 1})))
    assert (output / REPORT_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_the_precision_a_model_computes_in_does_not_change_its_fingerprint(bundled: Path) -> None:
    found = {
        precision: fingerprint(loaded.model, loaded.stored_dtypes)
        for precision in ("auto", "stored")
        for loaded in [load_model(str(bundled), precision=precision)]
    }
    assert found["auto"] == found["stored"]
