"""Everything that is measured on a GPU, in one command of under 8 minutes on an H100.

python benchmarks/gpu.py

Needs torch, transformers and BoTorch, the package on the path (PYTHONPATH=src will do) and 40 GB of GPU memory; no
models or data. Writes results/speed-gpu.md (storage, the whole of Llama-2-7B's shape) and results/trials-gpu.md (a
search's trial against a bare forward pass, 8 of its layers), and results/ldlq-gpu.md (one LDLQ pass at 4096 x 4096).
"""

from __future__ import annotations

import sys

import torch

import codebooks
import search
import speed
from common import markdown_table, write_result


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; on a CPU run speed.py and search.py")
    rows, figures = search.large_trials()
    body = (
        "Seconds of one trial over seconds of one bare forward pass, Llama-2-7B's shapes, 8 layers, 16 x 2048 tokens, "
    )
    body += "bfloat16:\n\n" + markdown_table(["", "median of the ratio", "range"], rows)
    write_result("trials-gpu", "What a trial costs on a GPU", "python benchmarks/gpu.py", body, figures)
    torch.cuda.empty_cache()
    timed = codebooks.pass_seconds()
    clock = codebooks.pass_table(timed)
    write_result("ldlq-gpu", "One LDLQ pass on a GPU", "python benchmarks/gpu.py", clock, timed)
    torch.cuda.empty_cache()
    speed.main()


if __name__ == "__main__":
    main()
