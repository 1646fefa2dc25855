"""Quantisation and CALDERA on wiki-llama-8m: what each step brings, and where bits are best spent.

python benchmarks/caldera.py steps
python benchmarks/caldera.py tuned
python benchmarks/caldera.py study
python benchmarks/caldera.py write

`steps`, `tuned` and `study` keep finished rows in --run-dir and go on after a stop; `write` makes the result files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from allocation import Kept, score
from common import ROOT, markdown_table, shared_directory, write_result
from rankwise import compress
from rankwise.flows.finetune import finetune
from rankwise.layers import cache_dense
from rankwise.progress import Reporter
from rankwise.recipes import FineTune, recipe_from
from rankwise.repair import LowRankFactors

MODEL = "wiki-llama-8m"
TEXTS = ("wikitext2.test", "mix.heldout")
D = 256
RANKS = (4, 8, 16, 32, 64)
SIZES = (2.1, 2.5, 3.0, 4.0)
LDLQ = {"name": "quantize", "output_feedback": False}
"""As the paper has it beside its own: errors are fed back along inputs alone."""
PLAIN = {"hadamard": False, "codebook": "uniform"}
STUDY = (
    "low rank, 16 bits",
    "low rank, 4 bits",
    "Q alone, uniform",
    "Q alone, spectral",
    "Q + L R, uniform",
    "Q + L R, spectral",
)


def steps() -> dict[str, dict[str, Any]]:
    """Rows of the first table: label -> method."""
    rows: dict[str, dict[str, Any]] = {}
    for bits in (2, 3, 4):
        rows[f"{bits} bits, to the nearest, uniform"] = {"name": "quantize", "q_bits": bits, "feedback": False, **PLAIN}
        rows[f"{bits} bits, LDLQ, uniform"] = {**LDLQ, "q_bits": bits, **PLAIN}
        rows[f"{bits} bits, LDLQ, Hadamard, E8P"] = {**LDLQ, "q_bits": bits}
        if bits == 2:
            whole = {**LDLQ, "q_bits": 2, "row_scales": False}
            rows["2 bits, LDLQ, Hadamard, E8P, one scale"] = whole
            rows["2 bits, LDLQ, Hadamard, E8P, 2 passes"] = {**LDLQ, "q_bits": 2, "passes": 2}
            for factors in (16, 4):
                for rank in RANKS:
                    rows[f"2 bits, rank {rank} at {factors} bits"] = caldera(rank, factors)
            for rank in (16, 32):
                rows[f"2 bits, rank {rank} at 16 bits, downdate"] = {**caldera(rank, 16), "downdate": True}
        else:
            rows[f"{bits} bits, rank 16 at 4 bits"] = {**caldera(16, 4), "q_bits": bits}
    rows["2 bits, rank 16 at 4 bits, 15 iterations"] = {**caldera(16, 4), "outer": 15}
    return rows


def caldera(rank: int, lr_bits: int) -> dict[str, Any]:
    return {"name": "caldera", "q_bits": 2, "rank": rank, "lr_bits": lr_bits, "outer": 5}


def study() -> dict[tuple[str, float], dict[str, Any]]:
    """Cells of the second: (label, bits a weight) -> keys of the recipe."""
    cells: dict[tuple[str, float], dict[str, Any]] = {}
    both = {"name": "caldera", "lr_bits": 4, "outer": 5}
    for bits in SIZES:
        kept = {"keep": bits / 16, "rank_multiple": 1, "storage": "pivoted"}
        cells["low rank, 16 bits", bits] = {"method": "two_sided", "allocation": "spectral", "budget": kept}
        size = {"bits": bits, "rank_multiple": 1}
        for label, method, allocation in (
            ("low rank, 4 bits", {**both, "q_bits": 0}, "spectral"),
            ("Q alone, uniform", LDLQ, "uniform"),
            ("Q alone, spectral", LDLQ, "spectral"),
            ("Q + L R, uniform", both, "uniform"),
            ("Q + L R, spectral", both, "spectral"),
        ):
            cells[label, bits] = {"method": method, "allocation": allocation, "budget": size}
    return cells


def protocol(shared: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Calibration, and evaluation by text: 256 x 256 tokens, and 100 x 256 of each text."""
    scored = {"sequences": 100, "sample": "random", "seed": 1, "length": 256, "bos": "never"}
    texts = {name: {"source": f"text:{shared}/data/{name}.txt", **scored} for name in TEXTS}
    return {"source": f"text:{shared}/data/mix.calibration.txt", "sequences": 256, "length": 256, "bos": "never"}, texts


def measure(shared: Path, run_directory: Path, **changes: Any) -> dict[str, Any]:
    """Compress once and score on both texts."""
    calibration, texts = protocol(shared)
    values = {"model": str(shared / "models" / MODEL), "calibration": calibration, **changes}
    recipe = recipe_from(values)
    started = time.monotonic()
    result = compress(recipe, run_directory=run_directory, reporter=Reporter(show=False))
    seconds = time.monotonic() - started
    cache_dense(result.model, True)
    bits = result.report.bits
    return {
        "bits": result.plan.kept * 16 if bits is None else bits.got,
        "perplexity": {text: score(result.model.float(), recipe.model, each) for text, each in texts.items()},
        "seconds": seconds,
    }


TUNED: dict[str, dict[str, Any]] = {
    "kl, stored at 16 bits": {},
    "kl, back to 4 bits": {"requantize": True},
    "kl, with the signs, stored at 16 bits": {"signs": True},
    "kl, the first 8 ranks, stored at 16 bits": {"trained_rank": 8},
}
"""Trainings of L and R: label -> settings."""

_LEARNED_CHARACTERS = 1_000_000


def tune(shared: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Compress at rank 16, train L and R once over the first megabyte of the calibration text, and score."""
    from rankwise.checkpoints import load_model

    start, tuned, text = folder / "start", folder / "tuned", folder / "learned.txt"
    calibration, texts = protocol(shared)
    source = str(shared / "models" / MODEL)
    if not start.exists():
        method = caldera(16, 4)
        recipe = recipe_from({"model": source, "calibration": calibration, "method": method, "output": str(start)})
        compress(recipe, run_directory=folder / "tuned-run", reporter=Reporter(show=False))
        whole = Path(calibration["source"].removeprefix("text:")).read_text()
        text.write_text(whole[:_LEARNED_CHARACTERS])
    started = time.monotonic()
    report = finetune(
        FineTune(
            model=str(start),
            data=f"text:{text}",
            output=str(tuned),
            method="lowrank",
            settings=LowRankFactors(epochs=1, **settings),
            length=256,
            bos="never",
        ),
        restart=True,
        reporter=Reporter(show=False),
    )
    seconds = time.monotonic() - started
    assert report.bits is not None
    model = load_model(str(tuned)).model.float()
    cache_dense(model, True)
    return {
        "bits": report.bits.got,
        "perplexity": {text: score(model, source, each) for text, each in texts.items()},
        "seconds": seconds,
        "accepted": report.finetune[-1].accepted,
    }


def run_tuned(shared: Path, folder: Path) -> None:
    kept = figures_of("tuned", folder)
    for how, settings in TUNED.items():
        label = f"2 bits, rank 16 at 4 bits, fine-tuned: {how}"
        if kept.get({"label": label}) is None:
            kept.add({"label": label, **tune(shared, folder, settings)})
            print(label, kept.figures[-1], flush=True)


def figures_of(part: str, run_directory: Path) -> Kept:
    run_directory.mkdir(parents=True, exist_ok=True)
    return Kept(run_directory / f"{part}.json")


def run_steps(shared: Path, folder: Path) -> None:
    kept = figures_of("steps", folder)
    if kept.get({"label": "dense"}) is None:
        from rankwise.checkpoints import load_model

        source = str(shared / "models" / MODEL)
        model = load_model(source).model
        scores = {text: score(model, source, each) for text, each in protocol(shared)[1].items()}
        kept.add({"label": "dense", "bits": 16.0, "perplexity": scores, "seconds": 0.0})
    for label, method in steps().items():
        if kept.get({"label": label}) is None:
            kept.add({"label": label, **measure(shared, folder / "steps-run", method=method)})
            print(label, kept.figures[-1], flush=True)


def run_study(shared: Path, folder: Path) -> None:
    kept = figures_of("study", folder)
    for (label, bits), changes in study().items():
        if kept.get({"label": label, "size": bits}) is None:
            found = measure(shared, folder / "study-run", **changes)
            kept.add({"label": label, "size": bits, **found})
            print(label, bits, kept.figures[-1], flush=True)


def write(folder: Path) -> None:
    figures = figures_of("steps", folder).figures + figures_of("tuned", folder).figures
    rows = [
        [f["label"], f"{f['bits']:.3f}", *(f"{f['perplexity'][t]:.2f}" for t in TEXTS), f"{f['seconds']:.0f}"]
        for f in figures
    ]
    note = (
        "256 x 256 tokens of calibration text, 100 x 256 scored tokens of each text, H damped by 1%, 5 outer "
        "iterations unless said. Bits a weight count codes, scales, signs and factors. Seconds on one core; a row that "
        "reuses statistics of another is shorter by them. Fine-tuning: one pass over the first megabyte of the "
        "calibration text.\n\n"
    )
    table = markdown_table(["", "bits a weight", *TEXTS, "seconds"], rows)
    write_result(
        "caldera", f"CALDERA step by step, {MODEL}", "python benchmarks/caldera.py steps", note + table, figures
    )
    cells = figures_of("study", folder).figures
    parts = []
    for text in TEXTS:
        by = {(f["label"], f["size"]): f["perplexity"][text] for f in cells}
        rows = [[label, *(f"{by[label, s]:.2f}" if (label, s) in by else "-" for s in SIZES)] for label in STUDY]
        parts.append(f"{text}\n\n" + markdown_table(["bits a weight", *(f"{s:g}" for s in SIZES)], rows) + "\n")
    parts.append("Low rank with 16 bits is stored as pivot rows, everything else as codes.")
    title = f"Low rank, quantisation and both at equal bytes, {MODEL}"
    write_result("caldera-study", title, "python benchmarks/caldera.py study", "\n".join(parts), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("steps", "tuned", "study", "write"))
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "caldera")
    given = parser.parse_args()
    if given.part == "write":
        write(given.run_dir)
    elif given.part == "steps":
        run_steps(shared_directory(), given.run_dir)
    elif given.part == "tuned":
        run_tuned(shared_directory(), given.run_dir)
    else:
        run_study(shared_directory(), given.run_dir)


if __name__ == "__main__":
    main()
