"""Minutes, not seconds: other tools on our checkpoints, and the larger real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import HARNESS_TASK
from rankwise import compress
from rankwise.recipes import recipe_from

pytestmark = pytest.mark.slow


def test_the_evaluation_harness_runs_a_local_task(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install '.[tasks]'")
    compress(recipe_from(settings(output=str(tmp_path / "out"))))
    rows = [{"text": "Return a", "choices": [" list", " sea"], "answer": 0} for _ in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(HARNESS_TASK.format(data=tmp_path / "data.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "which_comes_next", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path}/out,trust_remote_code=True,max_length=64"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "results").rglob("results*.json")).read_text())
    assert results["results"]["which_comes_next"]["acc,none"] in (0.0, 1.0)
    assert results["n-samples"]["which_comes_next"]["effective"] == 4


PROTOTYPE = {
    "svd": {0.4: 63.5, 0.25: 160.0},
    "asvd": {0.4: 61.6, 0.25: 121.0},
    "svd_llm": {0.4: 56.9, 0.25: 85.0},
    "afm": {0.4: 57.0, 0.25: 86.5},
}


@pytest.mark.parametrize("method", PROTOTYPE)
def test_wiki_llama_agrees_with_the_prototype(method: str, shared: Path, tmp_path: Path) -> None:
    text = {"source": f"text:{shared}/data/wikitext2.test.txt", "length": 256}
    for keep, expected in PROTOTYPE[method].items():
        values = {
            "model": str(shared / "models/wiki-llama-8m"),
            "method": method,
            "budget": {"keep": keep, "rank_multiple": 1},
            "calibration": {"source": f"text:{shared}/data/mix.calibration.txt", "sequences": 256, "length": 256},
            "evaluation": {**text, "sequences": 160, "sample": "random", "seed": 1, "batch_size": 16},
        }
        found = compress(recipe_from(values), run_directory=tmp_path).report.evaluation
        assert found.dense.perplexity == pytest.approx(49.7, abs=0.1)
        assert found.compressed.perplexity == pytest.approx(expected, rel=0.05)
