"""How long a first result takes on a real model, and how much memory: the command with default options, nothing kept.

python benchmarks/first_result.py [OPTIONS ...]

By default with `--keep 0.8` and with `--bits 4`. Needs `make real-model`; each run is the command itself, in a process
of its own with an empty folder for stages.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, markdown_table, write_result

MODEL = ROOT / "real-models" / "smollm2-135m"
RUNS = ["--keep 0.8", "--bits 4"]


def run(options: list[str]) -> dict[str, Any]:
    """Seconds in all and by stage, and the most memory that the command or a process it began held."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "out"
        command = [str(Path(sys.executable).with_name("rankwise")), "compress", str(MODEL), *options, "-o", str(output)]
        started = time.monotonic()
        subprocess.run(command, env={**os.environ, "RANKWISE_CACHE": f"{name}/cache"}, check=True)
        seconds = time.monotonic() - started
        report = json.loads((output / "rankwise_report.json").read_text())
    stages = {stage: figures["seconds"] for stage, figures in report["stages"].items()}
    # Of all runs so far the largest, in KB.
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    calibration = {key: report["calibration"][key] for key in ("sequences", "length", "gradient_sequences")}
    return {"seconds": seconds, "stages": stages, "peak_bytes": most, "calibration": calibration}


def main() -> None:
    figures, rows = [], []
    for name in sys.argv[1:] or RUNS:
        figures.append({"run": name, **run(name.split())})
        found = figures[-1]
        times = ", ".join(f"{stage} {took:.0f}" for stage, took in found["stages"].items() if took >= 0.5)
        rows.append([f"`{name}`", f"{found['seconds']:.0f}", f"{found['peak_bytes'] / 1e9:.2f} GB", times])
    read = figures[0]["calibration"]
    body = (
        f"`rankwise compress` of SmolLM2-135M-Instruct from start to end, all else by default: {read['sequences']} x "
        f"{read['length']} tokens of Python's documentation, gradients at {read['gradient_sequences']} of the "
        "sequences. Memory is the most that was resident in one process, of this run or one before.\n\n"
    ) + markdown_table(["options", "seconds", "memory", "seconds by stage"], rows)
    write_result("first_result", "The first result", "python benchmarks/first_result.py", body, figures)


if __name__ == "__main__":
    main()
