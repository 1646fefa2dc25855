"""One budget for every form: mixed plans beside Q alone and Q + L R, all spread by estimated loss, at equal bits.

python benchmarks/mixed.py wiki-llama-8m
python benchmarks/mixed.py smollm2-135m
python benchmarks/mixed.py write

The first needs the shared models, the second `make real-model` besides. Finished cells stay in --run-dir, and the same
command goes on after a stop; `write` makes the result files. --sizes and --rows measure some of the cells.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allocation import Kept
from common import ROOT, markdown_table, shared_directory, write_result
from rankwise import compress
from rankwise.checkpoints import load_model
from rankwise.data import load_sequences, parse_source
from rankwise.layers import cache_dense
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.sizes import Cut, Plan

SIZES = (2.1, 2.5, 3.0, 4.0)
TEXTS = ("wikitext2.test", "mix.heldout")
ROWS: dict[str, dict[str, Any]] = {
    "Q alone, LDLQ": {"method": {"name": "quantize", "output_feedback": False}, "allocation": "spectral"},
    "Q alone": {"method": "quantize", "allocation": "spectral"},
    "Q + L R": {"method": {"name": "caldera", "outer": 5}, "allocation": "spectral"},
    "mixed, LDLQ": {"method": {"name": "mixed", "outer": 5, "output_feedback": False}, "allocation": "spectral"},
    "mixed": {"method": "mixed", "allocation": "spectral"},
}
MODELS: dict[str, dict[str, Any]] = {
    "wiki-llama-8m": {"calibration": 256, "scored": 100, "batch": 8, "multiple": 1},
    "smollm2-135m": {"calibration": 48, "scored": 32, "batch": 2, "multiple": 8},
}
LENGTH = 256


def path_of(model: str, shared: Path) -> Path:
    """Where a model is."""
    return shared / "models" / model if model == "wiki-llama-8m" else ROOT / "real-models" / model


def texts_of(model: str, shared: Path) -> dict[str, torch.Tensor]:
    """Token ids by text, shape `[scored, LENGTH]`, drawn with seed 1."""
    loaded = load_model(str(path_of(model, shared)))
    return {
        text: load_sequences(
            parse_source(f"text:{shared}/data/{text}.txt"),
            loaded.tokenizer,
            loaded.vocabulary,
            length=LENGTH,
            count=MODELS[model]["scored"],
            seed=1,
        ).ids
        for text in TEXTS
    }


@torch.inference_mode()
def compare(dense: Any, small: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Perplexity of a model, and KL(dense || small) in nats a token."""
    nll = kl = 0.0
    for batch in ids.split(2):
        goal = dense(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found = small(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        nll -= float(found.gather(-1, batch[:, 1:, None].long()).double().sum())
        kl += float((goal.exp() * (goal - found)).sum(-1).double().sum())
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return float(torch.tensor(nll / tokens).exp()), kl / tokens


def scored(dense: Any, result: Any, texts: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Perplexity and KL to the original by text, of what `compress` returned."""
    cache_dense(result.model, True)
    small = result.model.float()
    scores = {name: compare(dense, small, ids) for name, ids in texts.items()}
    return {
        "perplexity": {name: score[0] for name, score in scores.items()},
        "kl": {name: score[1] for name, score in scores.items()},
    }


def form_of(cut: Cut) -> str:
    """The kind of a cut, for counting."""
    if cut.dense:
        return "dense"
    pair = "" if not cut.rank else "L R" if cut.lr_bits is None else f"L R at {cut.lr_bits}"
    return " + ".join(filter(None, (f"{cut.q_bits} bits" if cut.q_bits else "", pair)))


def chosen(plan: Plan) -> dict[str, float]:
    """Share of the weights by kind of cut."""
    count: Counter[str] = Counter()
    for name, cut in plan.cuts.items():
        count[form_of(cut)] += plan.shapes[name][0] * plan.shapes[name][1]
    return {kind: count[kind] / plan.weights for kind in sorted(count)}


def measure(model: str, shared: Path, folder: Path, row: str, bits: float, texts: dict[str, Any]) -> dict[str, Any]:
    """One cell."""
    settings, source = MODELS[model], str(path_of(model, shared))
    text = f"text:{shared}/data/mix.calibration.txt"
    values = {
        "model": source,
        "calibration": {
            "source": text,
            "sequences": settings["calibration"],
            "length": LENGTH,
            "batch_size": settings["batch"],
            "bos": "never",
        },
        "budget": {"bits": bits, "rank_multiple": settings["multiple"]},
        **ROWS[row],
    }
    started = time.monotonic()
    result = compress(recipe_from(values), run_directory=folder / f"run-{model}", reporter=Reporter(show=False))
    seconds = time.monotonic() - started
    return {
        "bits": result.plan.bits_a_weight,
        **scored(load_model(source).model, result, texts),
        "chosen": chosen(result.plan),
        "seconds": seconds,
    }


def run(model: str, shared: Path, folder: Path, rows: Sequence[str], sizes: Sequence[float]) -> None:
    kept = Kept(folder / f"mixed-{model}.jsonl")
    texts = texts_of(model, shared)
    if kept.get({"row": "dense"}) is None:
        dense = load_model(str(path_of(model, shared))).model
        kept.add({"row": "dense", "perplexity": {name: compare(dense, dense, ids)[0] for name, ids in texts.items()}})
    for bits in sizes:
        for row in rows:
            label = {"row": row, "asked": bits}
            if kept.get(label) is None:
                kept.add({**label, **measure(model, shared, folder, row, bits, texts)})
                print(kept.get(label), flush=True)


def write(folder: Path) -> None:
    figures: dict[str, Any] = {}
    parts = ["Rows of before stay where no newer ones are: date and machine are of the last.\n"]
    for model, settings in MODELS.items():
        kept = Kept(folder / f"mixed-{model}.jsonl")
        dense = kept.get({"row": "dense"})
        if dense is None:
            continue
        figures[model] = kept.figures
        parts.append(
            f"## {model}\n\nCalibration {settings['calibration']} x {LENGTH} tokens of mix.calibration, "
            f"{settings['scored']} x {LENGTH} tokens of each text scored, rank multiple {settings['multiple']}; "
            "codes are the lattice's, L R beside them has 4 bits, low rank alone is stored as `auto`; with LDLQ, "
            "and in Q + L R, errors are fed back along inputs alone, in 5 turns over Q and L R where there are both. "
            + ("The weights were rounded to 4 bits once before. " if model.startswith("smollm2") else "")
            + "Dense perplexity "
            + " and ".join(f"{dense['perplexity'][text]:.2f} on {text}" for text in TEXTS)
            + ".\n"
        )
        for text in TEXTS:
            rows = []
            for row in ROWS:
                cells = [kept.get({"row": row, "asked": bits}) for bits in SIZES]
                if not any(cells):
                    continue
                shown = ["-" if c is None else f"{c['perplexity'][text]:.2f} ({c['kl'][text]:.5f})" for c in cells]
                rows.append([row, *shown])
            header = ["perplexity (KL to the original, nats a token)", *(f"{bits:g} bits" for bits in SIZES)]
            parts.append(f"{text}\n\n" + markdown_table(header, rows) + "\n")
        lines = []
        for bits in SIZES:
            cell = kept.get({"row": "mixed", "asked": bits}) or kept.get({"row": "mixed, LDLQ", "asked": bits})
            if cell is not None:
                share = ", ".join(f"{kind} {100 * part:.1f}%" for kind, part in cell["chosen"].items())
                lines.append([f"{bits:g}", f"{cell['bits']:.3f}", share])
        header = ["asked", "bits a weight", "what `mixed` chose, by share of the weights"]
        parts.append(markdown_table(header, lines) + "\n")
    write_result("mixed", "One budget for every form", "python benchmarks/mixed.py MODEL", "\n".join(parts), figures)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*MODELS, "write"])
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".benchmarks" / "mixed")
    parser.add_argument("--sizes", type=lambda text: [float(part) for part in text.split(",")], default=SIZES)
    parser.add_argument("--rows", type=lambda text: text.split(";"))
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        write(arguments.run_dir)
        return
    rows = arguments.rows or list(ROWS)
    run(arguments.what, shared_directory(), arguments.run_dir, rows, arguments.sizes)


if __name__ == "__main__":
    main()
