"""What happens to a run that is killed, whose disk fills up, whose files are damaged, or that another run meets.

python benchmarks/reliability.py [PART ...] [--share SHARE]

Parts are kills, disks, damage, writers, workers and inputs; all by default. SHARE, 1 by default, makes fewer attempts
of every kind. A part that ends writes its row at once, and rows of other parts stay as they were.

Every attempt runs in a process of its own and is compared with the same run left alone: the same weights and the same
plan, or an error for people. Anything else is counted: lost (finished work is gone, or the run cannot go on), silently
wrong (success is said and the model is another), foreign (an exception that is not for people). Full disks are small
file systems in memory, which only root can mount; without it that part is left out and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import RESULTS, ROOT, ended, forked, markdown_table, write_result
from rankwise import compress
from rankwise.checkpoints import reload
from rankwise.data import python_text
from rankwise.progress import Reporter
from rankwise.quickstart import MODEL
from rankwise.recipes import recipe_from
from rankwise.runs import on_ray
from rankwise.stages import jobs

PARTS = {"kills": 60, "disks": 32, "damage": 100, "writers": 20, "workers": 5}
"""Attempts of each part."""

INPUTS = 100_000

JOBS = ("measure_shard", "estimate_losses", "look_at", "judge_cuts", "fit_codes")
"""What workers do in a run of codes whose plan is searched; see `rankwise.stages.jobs`."""

SEARCHED_CODES: dict[str, Any] = {
    "method": "quantize",
    "allocation": {"name": "bayesian", "space": "spectral", "trials": 6},
    "budget": {"bits": 3, "rank_multiple": 1},
    "validation": {"sequences": 4},
    "executor": "ray",
    "workers": 2,
}

RECIPES: dict[str, dict[str, Any]] = {
    "search and repair": {
        "method": "bolaco",
        "allocation": {"name": "bayesian", "trials": 4},
        "budget": {"keep": 0.6, "rank_multiple": 1},
        "validation": {"sequences": 8, "select": "top", "count": 4, "plans": 3},
        "repair": {"steps": ["refit", "blocks"], "blocks": {"epochs": 1}},
    },
    "codes": {"method": {"name": "caldera", "outer": 1}, "budget": {"bits": 3, "rank_multiple": 1}},
}


def tiny(folder: Path) -> Path:
    """A model of two small blocks with the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def values_of(model: Path, kind: str, output: Path) -> dict[str, Any]:
    calibration = {"source": "bundled:train", "sequences": 12, "length": 32, "batch_size": 4}
    asked = RECIPES.get(kind, SEARCHED_CODES)
    return {"model": str(model), "output": str(output), "calibration": calibration, **asked}


def mark(output: Path) -> str:
    """Hash of the weights and the plan."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "plan.json", "config.json"):
        digest.update((output / name).read_bytes())
    return digest.hexdigest()


def running(values: dict[str, Any], stages: Path) -> Callable[[], None]:
    return lambda: void(compress(recipe_from(values), run_directory=stages))


def by_itself(work: Callable[[], None]) -> Callable[[], None]:
    """The same with a reloading process of its own: who dies in a request leaves the shared one out of step."""

    def alone() -> None:
        reload._started.cache_clear()
        work()

    return alone


def void(_value: Any) -> None:
    return None


class Bench:
    """Models, runs left alone, and what came out of attempts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny(folder / "model")
        self.whole: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        for kind in RECIPES:
            started = time.monotonic()
            output = folder / f"alone {kind}"
            status = ended(forked(running(values_of(self.model, kind, output), folder / f"stages {kind}")))
            if status:
                sys.exit(f"the run left alone ends with {status}: {kind}")
            self.seconds[kind] = time.monotonic() - started
            self.whole[kind] = mark(output)

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def judge(self, kind: str, output: Path, stages: Path, counts: Counter[str]) -> None:
        """Run again to the end, and compare."""
        status = ended(forked(running(values_of(self.model, kind, output), stages)))
        if status == 70:
            counts["foreign"] += 1
        elif status or not (output / "model.safetensors").exists():
            counts["lost"] += 1
        else:
            counts["right" if mark(output) == self.whole[kind] else "silently wrong"] += 1


def kinds(number: int) -> str:
    return list(RECIPES)[number % len(RECIPES)]


def kills(bench: Bench, count: int, draw: random.Random, counts: Counter[str]) -> None:
    """kill -9 at a random moment, then the same command again."""
    for number in range(count):
        kind, place = kinds(number), bench.fresh()
        child = forked(by_itself(running(values_of(bench.model, kind, place / "out"), place / "stages")))
        time.sleep(draw.uniform(0, bench.seconds[kind]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        ended(child)
        bench.judge(kind, place / "out", place / "stages", counts)
        shutil.rmtree(place)


def disks(bench: Bench, count: int, draw: random.Random, counts: Counter[str]) -> None:
    """A disk that fills up at some stage; with room made, the same command again."""
    place = bench.fresh()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)], capture_output=True).returncode:
        counts["left out"] = count
        return
    subprocess.run(["umount", str(place)], check=True)
    for number in range(count):
        kind = kinds(number)
        used = sum(f.stat().st_size for f in (bench.folder / f"stages {kind}").rglob("*") if f.is_file())
        used += sum(f.stat().st_size for f in (bench.folder / f"alone {kind}").iterdir())
        size = max(1, int(used * (number + 1) / (count + 1)) // 1024)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], check=True)
        try:
            status = ended(forked(by_itself(running(values_of(bench.model, kind, place / "out"), place / "stages"))))
            if status not in (0, 2):
                counts["foreign"] += 1
                continue
            subprocess.run(["mount", "-o", "remount,size=1G", str(place)], check=True)
            bench.judge(kind, place / "out", place / "stages", counts)
        finally:
            subprocess.run(["umount", str(place)], check=True)


def damage_one(file: Path, how: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut" and content:
        del content[draw.randrange(len(content)) :]
    elif how == "noise":
        content = bytearray(draw.randbytes(len(content)))
    elif how == "empty":
        content.clear()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content)


def damage(bench: Bench, count: int, draw: random.Random, counts: Counter[str]) -> None:
    """One file of the finished stages damaged, then the same command again."""
    for number in range(count):
        kind, place = kinds(number), bench.fresh()
        shutil.copytree(bench.folder / f"stages {kind}", place / "stages")
        files = sorted(f for f in (place / "stages").rglob("*") if f.is_file() and f.name != ".lock")
        damage_one(draw.choice(files), draw.choice(["flip", "cut", "noise", "empty", "remove"]), draw)
        bench.judge(kind, place / "out", place / "stages", counts)
        shutil.rmtree(place)


def writers(bench: Bench, count: int, draw: random.Random, counts: Counter[str]) -> None:
    """Two runs with one output, begun at nearly one moment: each ends well or is refused, one result stays."""
    for _ in range(count):
        place = bench.fresh()
        children = []
        for kind in RECIPES:
            children.append(forked(by_itself(running(values_of(bench.model, kind, place / "out"), place / kind))))
            time.sleep(draw.uniform(0, 0.3))
        statuses = [ended(child) for child in children]
        if any(status not in (0, 2) for status in statuses):
            counts["foreign"] += 1
        elif 0 not in statuses:
            counts["lost"] += 1
        else:
            done = [kind for kind, status in zip(RECIPES, statuses, strict=True) if status == 0]
            whole = mark(place / "out") in {bench.whole[kind] for kind in done}
            stray = [entry.name for entry in place.iterdir() if entry.name.startswith(".")]
            counts["right" if whole and not stray else "silently wrong"] += 1
        shutil.rmtree(place)


def open_dying(root: Path, number: int, reporter: Reporter, *, mark: str, job: str, **arguments: Any) -> Any:
    """What a worker begins with, dead the first time that any does this job."""
    real = getattr(jobs, job)

    def dying(*given: Any, **named: Any) -> Any:
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(jobs, job, dying)
    return jobs.open_hand(root, number, reporter, **arguments)


def with_workers(values: dict[str, Any], stages: Path, job: str = "") -> Callable[[], None]:
    """A run with two workers on this machine, one of which dies of its first such job."""

    def work() -> None:
        real = on_ray.Opening
        if job:
            on_ray.Opening = lambda _function, asked: real(  # type: ignore[assignment, misc]
                "reliability:open_dying", {**asked, "mark": str(stages / "dead"), "job": job}
            )
        stages.mkdir(exist_ok=True)
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        void(compress(recipe_from(values), run_directory=stages))

    return by_itself(work)


def workers(bench: Bench, count: int, _draw: random.Random, counts: Counter[str]) -> None:
    """A worker killed in each kind of its jobs: the result is that of a run left alone."""
    kind, place = "workers", bench.fresh()
    if ended(forked(with_workers(values_of(bench.model, kind, place / "out"), place / "stages"))):
        sys.exit("the run with workers left alone does not end well")
    whole = mark(place / "out")
    for number in range(count):
        job, place = JOBS[number % len(JOBS)], bench.fresh()
        status = ended(forked(with_workers(values_of(bench.model, kind, place / "out"), place / "stages", job)))
        if not (place / "stages" / "dead").exists():
            sys.exit(f"no worker came to {job}")
        if status:
            counts["foreign" if status == 70 else "lost"] += 1
        else:
            counts["right" if mark(place / "out") == whole else "silently wrong"] += 1


OUTCOMES = ("right", "lost", "silently wrong", "foreign")

WORDS = {
    "kills": "kill -9 at a random moment, the same command again",
    "disks": "a disk that fills up, room made, the same command again",
    "damage": "a finished stage with one damaged file, the same command again",
    "writers": "two runs with one output",
    "workers": "one of two Ray workers killed in a job of each kind",
}


def inputs(count: int) -> None:
    """What the readers say to mutated files and options; see `tests/fuzzing`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "fuzzing", "--inputs", str(count), "--json", str(found)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, check=False)
        records = json.loads(found.read_text())
    header = ["input", "tried", "accepted", "refused", "foreign"]
    table = markdown_table(header, [[record[each] for each in header] for record in records])
    write_result("fuzz", "Inputs from outside, mutated", "make reliability", f"Seed 0.\n\n{table}", records)


def write(records: dict[str, dict[str, Any]]) -> None:
    """Write the rows that there are, in the order of the parts."""
    header = ["what", "times", *OUTCOMES]
    shown = [records[part] for part in PARTS if part in records]
    table = markdown_table(header, [[record[each] for each in header] for record in shown])
    body = (
        "A model of two small blocks; a run with a search and repairs, and one with codes, by turns; with workers, a "
        "search of codes.\n\n"
    )
    write_result("reliability", "Runs that are disturbed", "make reliability", body + table, shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS, "inputs"], help="all when none is named")
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    if unknown := set(given.parts) - {*PARTS, "inputs"}:
        sys.exit(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    # Shared by all children, which each would import and start them else.
    for name in ("botorch", "rankwise.allocation.surrogate", "rankwise.stages", "matplotlib.figure"):
        importlib.import_module(name)
    reload._elsewhere()
    python_text.documents("train")
    file = RESULTS / "reliability.json"
    before: list[dict[str, Any]] = json.loads(file.read_text())["figures"] if file.exists() else []
    records = {record["part"]: record for record in before}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part in [each for each in PARTS if each in given.parts]:
            times = math.ceil(given.share * PARTS[part])
            counts: Counter[str] = Counter()
            started = time.monotonic()
            globals()[part](bench, times, random.Random(part), counts)
            print(part, dict(counts), f"{time.monotonic() - started:.0f} s", flush=True)
            if not counts["left out"]:
                came = {each: counts[each] for each in OUTCOMES}
                records[part] = {"part": part, "what": WORDS[part], "times": times, **came}
                write(records)
    if "inputs" in given.parts:
        inputs(math.ceil(given.share * INPUTS))


if __name__ == "__main__":
    main()
