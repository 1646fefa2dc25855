"""Peak memory of calibration against the number of sequences: nothing may grow with it.

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from common import markdown_table, shared_directory, write_result

COUNTS = (64, 256, 1024)

_CHILD = """
import json, sys
import torch
from rankwise.checkpoints import load_model
from rankwise.methods import method_named
from rankwise.progress import _reset_peak_memory, peak_memory_bytes
from rankwise.models import find_sites, share_inputs
from rankwise.statistics import collect
model_path, method, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
loaded = load_model(model_path)
tokens = torch.randint(0, loaded.vocabulary, (count, 256), generator=torch.Generator().manual_seed(0))
sites = share_inputs(loaded.model, find_sites(loaded.model), tokens[:1])
_reset_peak_memory()
before = peak_memory_bytes()
records = collect(loaded.model, sites, tokens, method_named(method).requests(), batch_size=8)
print(json.dumps({"before": before, "peak": peak_memory_bytes()}))
"""


def main() -> None:
    model = str(shared_directory() / "models/wiki-llama-8m")
    rows: list[list[Any]] = []
    figures = []
    for method in ("bolaco", "two_sided"):
        for count in COUNTS:
            command = [sys.executable, "-c", _CHILD, model, method, str(count)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rise = (found["peak"] - found["before"]) / 1e6
            rows.append([method, count, f"{count * 256:,}", f"{rise:.1f}"])
            figures.append({"method": method, "sequences": count, **found})
    body = (
        "wiki-llama-8m, float32, batches of 8 x 256 random tokens, a fresh process each. The rise is of peak resident "
        "memory above the loaded model: accumulators and one batch.\n\n"
        + markdown_table(["method", "sequences", "tokens", "rise, MB"], rows)
    )
    write_result("memory", "Peak memory of calibration", "python benchmarks/memory.py", body, figures)


if __name__ == "__main__":
    main()
