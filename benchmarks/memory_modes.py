"""What a compression takes with the model whole in memory, block by block, and with hidden states in files.

python benchmarks/memory_modes.py [CASE ...] [--gpu]

Cases: `smollm2` (the real model, every mode), `llama-1b`, `llama-1b-4` and `llama-7b-2` (shapes of these models with
random weights in bfloat16, the latter two with four and with two blocks). Each run is a process of its own; a stage's
memory is what no file stands behind, sampled twenty times a second; what is expected is what `plan-memory` says now.
Models and stages take up to 30 GB of disk under the system's temporary folder. --gpu runs cases of its own on a GPU,
whose memory is what tensors take there; the result is `memory_modes-gpu`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, ROOT, ended, forked, markdown_table, write_result
from rankwise import compress
from rankwise.recipes import Recipe, recipe_from
from rankwise.stages.memory import Need, needs, shapes_of
from rankwise.statistics.curvature import DEFAULT_CURVATURE_GB

LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

CASES: dict[str, dict[str, Any]] = {
    "smollm2": {"modes": ("whole", "blocks", "disk"), "sequences": 16},
    "llama-1b": {"modes": ("disk",), "sequences": 8, "batch": 2, "shape": LLAMA_1B},
    "llama-1b-4": {
        "modes": ("disk",),
        "sequences": 8,
        "batch": 2,
        # What sixteen blocks get of the default, four get of a quarter.
        "curvature_gb": 2.0,
        "shape": LLAMA_1B | {"num_hidden_layers": 4},
    },
    "llama-7b-2": {"modes": ("disk",), "sequences": 8, "batch": 1, "shape": LLAMA_7B},
}

GPU_CASES: dict[str, dict[str, Any]] = {
    name: {"modes": ("whole", "blocks"), "sequences": 64, "device": "cuda", "shape": shape}
    for name, shape in {
        "smollm2": None,
        "llama-1b-4": LLAMA_1B | {"num_hidden_layers": 4},
        "llama-7b-2": LLAMA_7B,
    }.items()
}

LENGTH = 512
REAL = ROOT / "real-models" / "smollm2-135m"


def config_of(shape: dict[str, Any]) -> LlamaConfig:
    """The config of these shapes, its weights in bfloat16."""
    return LlamaConfig(**shape, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16)


def make(folder: Path, shape: dict[str, Any]) -> Path:
    """A checkpoint of these shapes with random weights, made in a process of its own."""

    def work() -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config_of(shape)).save_pretrained(folder)

    if ended(forked(work), 3600):
        sys.exit(f"no model could be made at {folder}")
    return folder


def asked(settings: dict[str, Any], mode: str, model: Path, folder: Path) -> Recipe:
    """The run of a case, with token ids from a file in a folder that gets the result, too."""
    source = f"tokens:{folder / 'ids'}"
    values = {
        "model": str(model),
        "output": str(folder / mode),
        "memory": mode,
        "device": settings.get("device", "cpu"),
        "method": {"name": "two_sided", "curvature_gb": settings.get("curvature_gb", DEFAULT_CURVATURE_GB)},
        "budget": {"keep": 0.8},
        "calibration": {
            "source": source,
            "sequences": settings["sequences"],
            "length": LENGTH,
            "sample": "first",
            "batch_size": settings.get("batch", 8),
        },
        "evaluation": {"source": source, "sequences": 4, "skip": settings["sequences"]},
    }
    return recipe_from(values)


def expected(settings: dict[str, Any], mode: str) -> Need:
    """What `plan-memory` says a case takes, from its config alone."""
    shape = settings.get("shape")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shape:
            config_of(shape).save_pretrained(folder)
        return needs(shapes_of(asked(settings, mode, folder if shape else REAL, folder)))[mode]


def run(case: str, settings: dict[str, Any], mode: str, model: Path, folder: Path) -> dict[str, Any]:
    """Compress in a process of its own; what its report says."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (settings["sequences"] + 4, LENGTH), generator=draw)
    save_file({"ids": ids}, folder / "ids")
    recipe = asked(settings, mode, model, folder)
    status = ended(forked(lambda: compress(recipe, run_directory=folder / f"stages-{mode}")), 7200)
    if status:
        sys.exit(f"{case} with --memory {mode} ends with {status}")
    report = json.loads((folder / mode / "rankwise_report.json").read_text())
    stages = {
        name: {
            "seconds": stage["seconds"],
            "gb": stage["anonymous_bytes"] / 1e9,
            **({"gpu_gb": stage["gpu_bytes"] / 1e9} if "gpu_bytes" in stage else {}),
        }
        for name, stage in report["stages"].items()
    }
    weights = hashlib.sha256((folder / mode / "model.safetensors").read_bytes()).hexdigest()
    plan = hashlib.sha256((folder / mode / "plan.json").read_bytes()).hexdigest()
    return {"case": case, "mode": mode, "stages": stages, "weights": weights, "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*", help="all without one, but for llama-1b-4 on a CPU")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    cases, name_of_result = (GPU_CASES, "memory_modes-gpu") if arguments.gpu else (CASES, "memory_modes")
    if unknown := set(arguments.case) - set(cases):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    known = RESULTS / f"{name_of_result}.json"
    figures = json.loads(known.read_text())["figures"] if known.exists() else []
    for case in arguments.case or (GPU_CASES if arguments.gpu else ["smollm2", "llama-1b", "llama-7b-2"]):
        figures = [each for each in figures if each["case"] != case]
        with tempfile.TemporaryDirectory() as name:
            folder, settings = Path(name), cases[case]
            shape = settings.get("shape")
            model = make(folder / "model", shape) if shape else REAL
            for mode in settings["modes"]:
                figures.append(run(case, settings, mode, model, folder))
                print(case, mode, figures[-1], flush=True)
        # In a process of its own, which may ask the GPU for its name: one that has cannot be forked.
        if ended(forked(partial(write, name_of_result, cases, figures))):
            sys.exit("the results could not be written")


def write(name: str, cases: dict[str, dict[str, Any]], figures: list[dict[str, Any]]) -> None:
    """Both result files; what is expected is what is expected now."""
    rows = []
    for each in figures:
        need, stages = expected(cases[each["case"]], each["mode"]), each["stages"]
        row = [each["case"], each["mode"]]
        for key, of_need in {"gb": need.host, "gpu_gb": need.device}.items():
            if of_need:
                most = max(stages, key=lambda stage: stages[stage].get(key, 0))
                each[key], each[f"expected_{key}"] = stages[most][key], of_need / 1e9
                row += [f"{each[key]:.2f} ({most})", f"{of_need / 1e9:.2f}"]
        times = ", ".join(f"{stage} {spent['seconds']:.0f}" for stage, spent in stages.items() if spent["seconds"] >= 1)
        rows.append([*row, times, each["weights"][:8]])
    on_gpu = ["most GB on the GPU (in)", "expected"] if name.endswith("gpu") else []
    header = ["model", "memory", "most GB without a file (in)", "expected", *on_gpu, "seconds by stage", "weights"]
    body = f"Random tokens, sequences of 512, keep 0.8, the default method.\n\n{markdown_table(header, rows)}"
    command = f"python benchmarks/memory_modes.py{' --gpu' if on_gpu else ''}"
    write_result(name, "Memory by the way a model is held", command, body, figures)


if __name__ == "__main__":
    main()
