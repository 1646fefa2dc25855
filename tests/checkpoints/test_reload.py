"""A checkpoint that is not the model in memory is never kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_llama
from rankwise import compress
from rankwise.checkpoints import check_reload, load_model, reload, save_dense, save_low_rank
from rankwise.errors import ModelError, NotFiniteError
from rankwise.models import find_sites
from rankwise.recipes import recipe_from
from rankwise.stages import finish

Settings = Callable[..., dict[str, Any]]

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def written(tiny: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A plain checkpoint and the model it was written from."""
    loaded = load_model(str(tiny))
    folder = tmp_path / "written"
    folder.mkdir()
    save_dense(folder, loaded, find_sites(loaded.model))
    return folder, loaded.model


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.0001
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "broken.Model", "AutoConfig": "broken.Config"})
    (folder / "broken.py").write_text("raise RuntimeError('no such thing')")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (change_weight, "another model.norm.weight"),
    "a buffer that no file holds": (
        lambda folder: change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        "another model.rotary_emb.inv_freq",
    ),
    "arithmetic alone": (lambda folder: change_config(folder, rms_norm_eps=0.1), "other logits"),
    "a missing layer": (lambda folder: change_config(folder, num_hidden_layers=1), "not expected"),
    "code that fails": (change_code, "cannot be loaded again"),
}


def test_a_checkpoint_that_is_the_model_passes(written: tuple[Path, Any]) -> None:
    check_reload(*written, IDS, trust_remote_code=False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_found(written: tuple[Path, Any], change: str) -> None:
    folder, model = written
    damage, says = CHANGES[change]
    damage(folder)
    with pytest.raises(ModelError, match=says):
        check_reload(folder, model, IDS, trust_remote_code=change == "code that fails")


def test_the_process_cannot_import_rankwise(written: tuple[Path, Any]) -> None:
    folder, model = written
    change_code(folder)
    (folder / "broken.py").write_text("import rankwise")
    with pytest.raises(ModelError, match="import of rankwise halted"):
        check_reload(folder, model, IDS, trust_remote_code=True)


def test_a_process_that_is_killed_is_said_and_started_anew(written: tuple[Path, Any]) -> None:
    folder, model = written
    change_code(folder)
    (folder / "broken.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ModelError, match="stopped by SIGKILL"):
        check_reload(folder, model, IDS, trust_remote_code=True)
    helper = reload._elsewhere()._process
    os.kill(helper.pid, signal.SIGKILL)
    helper.wait()
    with pytest.raises(ModelError, match="stopped by SIGKILL"):
        check_reload(folder, model, IDS, trust_remote_code=True)


def test_a_wrong_checkpoint_is_never_there(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: Path, *rest: Any) -> None:
        save_low_rank(folder, *rest)
        change_weight(folder)

    monkeypatch.setattr(finish, "save_low_rank", save)
    with pytest.raises(ModelError, match="it is not kept"):
        compress(recipe_from(settings(output=str(tmp_path / "out"))), run_directory=tmp_path / "stages")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_number_out_of_range_is_named_when_it_is_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(folder: Path, loaded: Any, *rest: Any) -> None:
        loaded.model.model.layers[1].self_attn.q_proj.left.weight.data[0, 0] = torch.inf
        save_low_rank(folder, loaded, *rest)

    monkeypatch.setattr(finish, "save_low_rank", save)
    with pytest.raises(NotFiniteError, match=r"layers\.1\.self_attn\.q_proj\.left\.weight"):
        compress(recipe_from(settings(output=str(tmp_path / "out"), budget={"keep": 0.5, "storage": "two_factor"})))
    assert not (tmp_path / "out").exists()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    loaded = load_model(str(tmp_path / "tied"))
    written = set()
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        save_low_rank(folder, loaded, find_sites(loaded.model))
        written.add((folder / "model.safetensors").read_bytes())
    assert len(written) == 1
