"""What no file holds is filled when a checkpoint is loaded, as the original's code fills it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_architectures import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.checkpoints import load_model, save_low_rank
from rankwise.layers import substitute
from rankwise.methods.svd import SVD
from rankwise.models import find_sites

FALCON = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MAMBA = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
CASES: dict[str, dict[str, Any]] = {
    # Its model fills a buffer of its mixers; a class of ours once left it to chance.
    "FalconH1": {**SMALL, **FALCON, "mamba_n_groups": 1, "ssm_multipliers": [0.5, 0.7, 1.1, 1.3, 0.9]},
    # They fill projections by their names, which are other layers here.
    "Mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "RecurrentGemma": {**SMALL, "lru_width": 32, "num_hidden_layers": 3},
    "CTRL": {"vocab_size": 128, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def compressed(name: str, folder: Path) -> Any:
    """A random model of a family, written with two factors at every site; returned as it was in memory."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    loaded = load_model(str(folder / "dense"))
    sites = find_sites(loaded.model)
    for site in sites:
        basis = SVD().decompose(site.weight(loaded.model).double(), None)  # type: ignore[arg-type]
        factors = basis.truncate(max(1, basis.rank // 2), site.bias(loaded.model))
        substitute(loaded.model, site.name, factors, "two_factor", torch.float32)
    (folder / "small").mkdir()
    save_low_rank(folder / "small", loaded, sites)
    return loaded.model


@pytest.mark.parametrize("name", CASES)
def test_every_family_reloads_the_same(name: str, tmp_path: Path) -> None:
    ids = torch.arange(32).view(2, 16)
    options = {"trust_remote_code": True}
    with torch.no_grad():
        expected = compressed(name, tmp_path)(input_ids=ids, use_cache=False).logits
        for _ in range(2):
            # What was in memory before is what an uninitialised buffer shows.
            [torch.full((size,), 7.0) for size in range(1, 1500)]
            for model in (
                AutoModelForCausalLM.from_pretrained(tmp_path / "small", **options),
                load_model(str(tmp_path / "small")).model,
            ):
                torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "small", **options)
    fresh = AutoModelForCausalLM.from_config(config, **options).eval()
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert torch.isfinite(fresh(input_ids=ids, use_cache=False).logits).all()


NEEDING = """
import json, sys
sys.modules["rankwise"] = None  # importing it fails, as where it is not installed
import transformers
from transformers import AutoModelForCausalLM
path = sys.argv[1] + "/config.json"
whole = json.load(open(path))
for version, changes in json.loads(sys.argv[2]):
    transformers.__version__ = version
    json.dump({**whole, "rankwise": {**whole["rankwise"], **changes}}, open(path, "w"))
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        print("loaded")
    except ImportError as problem:
        print(str(problem).replace(chr(10), " "))
"""


def test_a_checkpoint_says_what_it_needs_without_rankwise(tmp_path: Path) -> None:
    compressed("CTRL", tmp_path)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("5.9.1", {}, "needs transformers 5.10 or newer; installed is 5.9.1"),
        ("5.10.0.dev0", {}, "loaded"),
        ("5.23.0", {"needs": {"transformers": ">=5.10"}}, "loaded"),
        ("5.23.0", {"needs": {"transformers": ">=99.1"}}, "needs transformers 99.1 or newer"),
        ("5.23.0", {"needs": {"torch": ">=3"}}, "needs torch >=3, of which this code knows nothing"),
        ("5.23.0", {"format": 99}, "is of format 99; this code reads formats 1 to"),
    ]
    arguments = [str(tmp_path / "small"), json.dumps([case[:2] for case in cases])]
    done = subprocess.run(
        [sys.executable, "-c", NEEDING, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    for (_, _, says), found in zip(cases, done.stdout.splitlines(), strict=True):
        assert says in found
