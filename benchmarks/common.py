"""What every benchmark shares: where the real models are, the machine's name, and the form of a result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import RankwiseError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def shared_directory() -> Path:
    """The folder with real models and text: `RANKWISE_SHARED`, else `../shared` from the project's root."""
    folder = Path(os.environ.get("RANKWISE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        sys.exit(f"no models at {folder}: set RANKWISE_SHARED to the folder that holds models/ and data/")
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with one line a row."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def forked(work: Callable[[], Any]) -> int:
    """The process id of a child that does this and ends with 0, 2 for an error for people, 70 for any other."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        work()
        status = 0
    except RankwiseError:
        status = 2
    finally:
        os._exit(status)


def ended(child: int, seconds: float = 600.0) -> int:
    """A child's exit status, negative for a signal; it is killed when it takes longer."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def write_result(name: str, title: str, command: str, body: str, figures: Any) -> None:
    """Write `results/NAME.md` for people and `results/NAME.json` for programs, and print the former."""
    RESULTS.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    facts = machine()
    where = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"# {title}\n\nMeasured {today} with `{command}` on: {where}.\n\n{body}\n"
    (RESULTS / f"{name}.md").write_text(text)
    record = {"title": title, "date": today, "command": command, "machine": facts, "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(text)
