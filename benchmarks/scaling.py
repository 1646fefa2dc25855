"""What workers change, and how time and memory grow with layers, width, tokens, trials and workers.

python benchmarks/scaling.py workers
python benchmarks/scaling.py costs
python benchmarks/scaling.py write

`workers` compresses SmolLM2 (`make real-model`) in one process, with two workers on this machine, and with two of which
one is killed. `costs` times passes and decompositions, from which `write` extrapolates. Figures stay in --run-dir.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from common import ROOT, markdown_table, shared_directory, write_result
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.methods import TwoSided, method_named
from rankwise.models import Site, find_sites, share_inputs
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.runs.on_ray import RayCrew
from rankwise.stages.memory import needs, shapes_of
from rankwise.statistics import SiteStatistics, Store, collect, save_totals
from rankwise.statistics.shards import shards

LENGTH, BATCH = 256, 4
STAGES = ("load", "statistics", "outlooks", "plan", "fits")
TOKENS = (4, 20)
"""Sequences of two passes; what one takes more than the other is of their tokens alone."""

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405B: dict[str, Any] = {
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
BOTH: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "model_type": "llama",
}
LARGE = {"70B": LLAMA_70B | BOTH, "405B": LLAMA_405B | BOTH}
SEQUENCES, TRIALS, VALIDATED = 256, 50, 32
"""Of the extrapolated run, of 512 tokens each."""


def recipe(model: str, sequences: int, **more: Any) -> dict[str, Any]:
    """The run that all time: the default method."""
    text = f"text:{shared_directory()}/data/mix.calibration.txt"
    calibration = {"source": text, "sequences": sequences, "length": LENGTH, "batch_size": BATCH, "bos": "never"}
    return {"model": model, "method": "two_sided", "budget": {"keep": 0.8}, "calibration": calibration, **more}


def with_workers(sequences: int) -> dict[str, Any]:
    """By way: seconds of stages, and how plan and weights differ from those of one process."""
    model = str(ROOT / "real-models" / "smollm2-135m")
    ways: dict[str, dict[str, Any]] = {
        "one process": {},
        "two workers": {"executor": "ray", "workers": 2},
        "two workers, one killed": {"executor": "ray", "workers": 2},
    }
    found: dict[str, Any] = {}
    first: Any = None
    for way, more in ways.items():
        with tempfile.TemporaryDirectory() as run:
            reporter = Reporter(show=False)
            killer = None
            if way.endswith("killed"):
                killer = threading.Thread(target=_kill_one, args=(Path(run),), daemon=True)
                killer.start()
            made = compress(recipe_from(recipe(model, sequences, **more)), run_directory=run, reporter=reporter)
        state = made.model.state_dict()
        if first is None:
            first = made.plan, {name: tensor.clone() for name, tensor in state.items()}
        apart = max(float((state[name].float() - tensor.float()).abs().max()) for name, tensor in first[1].items())
        found[way] = {
            "seconds": {name: made.report.stages[name].seconds for name in STAGES},
            "same plan": made.plan.cuts == first[0].cuts,
            "largest difference of a number": apart,
            "died": sum("died" in note for note in reporter.notes),
        }
        print(way, found[way], flush=True)
    return found


def _kill_one(run: Path) -> None:
    """Kill the first worker a while after it began on its shard."""
    crews: list[RayCrew] = []
    real = RayCrew.results

    def watched(self: RayCrew, *arguments: Any) -> Any:
        crews.append(self)
        return real(self, *arguments)

    RayCrew.results = watched  # type: ignore[method-assign, assignment]
    while not crews:
        time.sleep(0.1)
    pid = crews[0].pids()[0]
    time.sleep(5)
    RayCrew.results = real  # type: ignore[method-assign]
    os.kill(pid, signal.SIGKILL)


def operations_a_token(sites: list[Site], vocabulary: int, width: int) -> float:
    """Of the passes of the default method: forward, again, backward; the head in three; moments and curvature."""
    passes = sum(8 * site.m * site.n for site in sites) + 6 * vocabulary * width
    inputs = {site.group: site.n for site in sites}
    moments = sum(2 * n * n for n in inputs.values())
    return passes + moments + sum(2 * site.m * site.m for site in sites)


def unit(m: int, n: int) -> float:
    """What a decomposition grows with: roots of the metrics, and the decomposition of what they weigh."""
    return float(m**3 + n**3 + m * n * min(m, n))


def costs() -> dict[str, Any]:
    """Operations a second of the passes, and seconds a unit of decompositions."""
    shared = shared_directory()
    passes = {}
    for name, path in {
        "wiki-llama-8m": shared / "models" / "wiki-llama-8m",
        "smollm2-135m": ROOT / "real-models" / "smollm2-135m",
    }.items():
        loaded = load_model(str(path))
        ids = torch.randint(3, loaded.vocabulary, (max(TOKENS), LENGTH), generator=torch.Generator().manual_seed(0))
        sites = share_inputs(loaded.model, find_sites(loaded.model), ids[:1])
        requests = TwoSided().requests()
        took = []
        for count in TOKENS:
            started = time.monotonic()
            collect(loaded.model, sites, ids[:count], requests, batch_size=BATCH)
            took.append(time.monotonic() - started)
        tokens = (TOKENS[1] - TOKENS[0]) * LENGTH
        each = operations_a_token(sites, loaded.vocabulary, loaded.model.config.hidden_size)
        passes[name] = {"seconds a token": (took[1] - took[0]) / tokens, "operations a token": each}
        print(name, passes[name], flush=True)
    decompositions = {}
    for m, n in SHAPES:
        seconds = _decomposition(m, n)
        decompositions[f"{m} x {n}"] = {"seconds": seconds, "unit": unit(m, n)}
        print(m, n, seconds, flush=True)
    return {"passes": passes, "decompositions": decompositions}


def _decomposition(m: int, n: int) -> float:
    """Seconds of one outlook of the default method at a random weight whose statistics are of twice as many tokens."""
    torch.manual_seed(0)
    site = Site("0", "q", 0, m, n, False, False, "0")
    method = method_named("two_sided")
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for number, statistic in enumerate(method.requests()):
            ((stream, start),) = [(s, statistic.sums([s], 2, Reporter(show=False))) for s in statistic.streams([site])]
            sums = start(stream.d, torch.device("cpu"))
            vectors = torch.randn(2, max(m, n), stream.d)
            sums.add(vectors, torch.randn(2, max(m, n), n))
            folders[statistic] = Path(name) / str(number)
            save_totals(folders[statistic] / f"{stream.key}.safetensors", statistic.totals_of(sums.take()))
        weight = torch.randn(m, n, dtype=torch.float64)
        seen = SiteStatistics(site, weight, None, Store(folders, [site]))
        started = time.monotonic()
        method.outlook(weight, seen, 0, torch.Generator())
        return time.monotonic() - started


def extrapolated(found: dict[str, Any]) -> list[list[str]]:
    """Rows of hours for large models at the speed of this machine, by workers of its kind; and memory of one."""
    rate = found["passes"]["smollm2-135m"]
    speed = rate["operations a token"] / rate["seconds a token"]
    largest = found["decompositions"]["2048 x 2048"]
    each = largest["seconds"] / largest["unit"]
    rows = []
    for name, config in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(
                json.dumps({**config, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"})
            )
            asked = {"sequences": SEQUENCES, "length": 512, "batch_size": 1, "source": "bundled"}
            shapes = shapes_of(recipe_from({"model": folder, "method": "two_sided", "calibration": asked}))
            need = needs(shapes)["disk"]
        sites = list(shapes.sites)
        tokens = SEQUENCES * 512
        passes = operations_a_token(sites, config["vocab_size"], config["hidden_size"]) * tokens
        units = sum(unit(site.m, site.n) for site in sites)
        forward = 2 * sum(site.parameters for site in sites) + 2 * config["vocab_size"] * config["hidden_size"]
        trials = TRIALS * VALIDATED * 512 * forward
        for workers in (1, 8, 32):
            parts = len(shards(SEQUENCES, 512, 1, TwoSided().requests(), workers))
            hours = [passes / speed / parts, units * each / workers, trials / speed / min(workers, TRIALS)]
            rows.append(
                [
                    name,
                    f"{workers}",
                    *(f"{value / 3600:,.0f}" for value in hours),
                    f"{need.host / 1e9:.0f} GB",
                ]
            )
        rows[-3] += [f"{passes:.2g}", f"{units:.2g}", f"{trials:.2g}"]
        for row in rows[-2:]:
            row += ["", "", ""]
    return rows


def write(folder: Path) -> None:
    """Write the result files."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("workers", "costs")}
    ways = found["workers"]["ways"]
    body = (
        f"SmolLM2-135M, default method, keep 0.8, {found['workers']['sequences']} x {LENGTH} tokens. Seconds by stage; "
        "one process has both cores, a worker one.\n\n"
    )
    rows = [
        [
            way,
            *(f"{figures['seconds'][stage]:.0f}" for stage in STAGES),
            "yes" if figures["same plan"] else "no",
            f"{figures['largest difference of a number']:.1e}",
            figures["died"],
        ]
        for way, figures in ways.items()
    ]
    body += markdown_table(["", *STAGES, "same plan", "largest difference of a number", "workers that died"], rows)
    passes = [
        [
            name,
            f"{1000 * each['seconds a token']:.2f} ms",
            f"{each['operations a token']:.2g}",
            f"{each['operations a token'] / each['seconds a token']:.2g}",
        ]
        for name, each in found["costs"]["passes"].items()
    ]
    body += "\n\n## Passes\n\n" + markdown_table(
        ["model", "a token", "operations a token", "operations a second"], passes
    )
    looks = [
        [shape, f"{each['seconds']:.2f} s", f"{each['unit']:.2g}", f"{each['seconds'] / each['unit']:.2g}"]
        for shape, each in found["costs"]["decompositions"].items()
    ]
    body += "\n\n## Decompositions\n\n" + markdown_table(
        ["m x n", "seconds", "m^3 + n^3 + m n min(m, n)", "seconds a unit"], looks
    )
    header = [
        "model",
        "workers",
        "statistics, h",
        "outlooks, h",
        "search, h",
        "memory of one",
        "operations of the passes",
        "units of decompositions",
        "operations of the search",
    ]
    body += (
        f"\n\n## Extrapolated\n\nHours at these speeds (SmolLM2's passes, the decomposition of 2048 x 2048), work "
        f"shared evenly over the shards that there can be, full curvature: {SEQUENCES} calibration sequences of 512 "
        f"tokens, {TRIALS} trials over {VALIDATED} more. "
        "Memory is what `plan-memory` says of `--memory disk`.\n\n"
        + markdown_table(header, extrapolated(found["costs"]))
    )
    write_result("scaling", "Workers, and how time grows", "python benchmarks/scaling.py write", body, found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["workers", "costs", "write"])
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "scaling")
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        write(arguments.run_dir)
        return
    found: Any = costs() if arguments.what == "costs" else {}
    if arguments.what == "workers":
        found = {"sequences": arguments.sequences, "ways": with_workers(arguments.sequences)}
    (arguments.run_dir / f"{arguments.what}.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
