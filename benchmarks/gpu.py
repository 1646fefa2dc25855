"""Everything that is measured on a GPU, in one command.

python benchmarks/gpu.py

Needs torch, transformers and BoTorch, the package on the path (PYTHONPATH=src will do) and 40 GB of GPU memory; no
models or data. Writes results/speed-gpu.md (storage, the whole of Llama-2-7B's shape) and results/trials-gpu.md (a
search's trial against a bare forward pass, 8 of its layers), results/ldlq-gpu.md (one pass of rounding at 4096 x 4096)
and results/runs-gpu.md (whole runs of `compress` on two blocks of Llama-3.2-1B's shape). Names of parts run those
alone: on an H100 `trials` took 32 seconds, `speed` 63.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import codebooks
import search
import speed
from common import markdown_table, write_result
from rankwise import compress
from rankwise.progress import Reporter
from rankwise.quantizers import lattice
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from

BLOCKS = 2
SIZES: dict[str, dict[str, Any]] = {
    "two_sided, keep 0.8": {"method": "two_sided", "budget": {"keep": 0.8}},
    "quantize, 3 bits": {"method": "quantize", "budget": {"bits": 3.0}},
    "caldera, 3 bits": {"method": {"name": "caldera", "outer": 5}, "budget": {"bits": 3.0}},
}


def trials() -> None:
    """A search's trial against a bare forward pass."""
    rows, figures = search.large_trials()
    body = (
        "Seconds of one trial over seconds of one bare forward pass, Llama-2-7B's shapes, 8 layers, 16 x 2048 tokens, "
    )
    body += "bfloat16:\n\n" + markdown_table(["", "median of the ratio", "range"], rows)
    write_result("trials-gpu", "What a trial costs on a GPU", "python benchmarks/gpu.py", body, figures)


def ldlq() -> None:
    """One pass of rounding, and the same with the nearest codeword found as on a CPU."""
    timed = codebooks.pass_seconds()
    usual, lattice.nearest_of_all = lattice.nearest_of_all, lattice.nearest_by_kinds
    slower = codebooks.pass_seconds()
    lattice.nearest_of_all = usual
    rows = [
        [name, bits, f"{seconds:.2f}", f"{other:.2f}"]
        for (name, bits, seconds), (_, _, other) in zip(timed, slower, strict=True)
        if bits
    ]
    header = ["", "bits", f"seconds at {codebooks.SIDE} x {codebooks.SIDE}"]
    body = (
        "The nearest codeword of E8P is found on a GPU by trying all 256 patterns; beside it, in the same run, by the "
        "way that is\nquicker on a CPU. Codes of `uniform` are the same in both columns.\n\n"
    )
    body += markdown_table([*header, "with kinds of pattern compared, as on a CPU"], rows)
    figures = {"all patterns": timed, "as on a CPU": slower}
    write_result("ldlq-gpu", "One pass of rounding on a GPU", "python benchmarks/gpu.py ldlq", body, figures)


def runs() -> None:
    """Seconds and memory by stage of whole runs on random weights, written after each of them."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        with torch.device("cuda"):
            model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
        del model
        for name, settings in SIZES.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            recipe = recipe_from(
                {
                    "model": str(folder / "model"),
                    "output": str(folder / "out"),
                    "calibration": {"source": "bundled:train", "sequences": 64, "length": 512},
                    "device": "cuda",
                    **settings,
                }
            )
            stages = compress(recipe, overwrite=True, reporter=Reporter(lines=True)).report.stages
            seconds = {stage: spent.seconds for stage, spent in stages.items()}
            peak = torch.cuda.max_memory_allocated()
            figures.append({"run": name, "seconds": seconds, "peak_gpu_bytes": peak})
            parts = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items() if spent >= 0.1)
            rows.append([name, f"{sum(seconds.values()):.1f}", f"{peak / 2**30:.1f}", parts])
            body = (
                f"{BLOCKS} blocks of Llama-3.2-1B's shape, its vocabulary, random weights, bfloat16; 64 x 512 tokens "
                "of calibration; `compress` from the checkpoint to the checkpoint.\n\n"
            )
            body += markdown_table(["run", "seconds", "peak GPU memory, GiB", "seconds by stage"], rows)
            write_result("runs-gpu", "Whole runs on a GPU", "python benchmarks/gpu.py", body, figures)


PARTS: dict[str, Callable[[], None]] = {"trials": trials, "ldlq": ldlq, "speed": speed.main, "runs": runs}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; on a CPU run speed.py and search.py")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
