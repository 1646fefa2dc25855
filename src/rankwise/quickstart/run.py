"""Compress the bundled model and show the result: sizes, perplexity on held-out text, a sample from each."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rankwise.checkpoints import load_model
from rankwise.evaluation import generate
from rankwise.flows.compress import compress
from rankwise.progress import Reporter
from rankwise.recipes import recipe_from
from rankwise.reports import print_closing

MODEL = Path(__file__).parent / "pydoc-llama"
"""A Llama of 2.4 million parameters, trained by `examples/train_quickstart_model.py`."""

_PROMPT = "Return a list of"


def run(output: Path, keep: float, reporter: Reporter, *, overwrite: bool = False) -> None:
    """Compress, write to `output`, print.

    Args:
        output: directory to write.
        keep: fraction of the decoder's linear weights to keep.
        reporter: told about progress.
        overwrite: replace the result of another model too, where `output` holds one.
    """
    recipe = recipe_from(
        {
            "model": str(MODEL),
            "output": str(output),
            "budget": {"keep": keep},
            "calibration": {"source": "bundled:train", "sequences": 128, "length": 256},
            "evaluation": {"source": "bundled:heldout", "length": 256, "sequences": 96},
        },
        origin="quickstart",
    )
    stages = output.with_name(f".{output.name}.run")
    compressed = compress(recipe, run_directory=stages, overwrite=overwrite, reporter=reporter)
    dense = load_model(str(MODEL))
    small = load_model(str(output))
    console = Console(width=100)
    print_closing(compressed.report)
    for label, loaded in (("before", dense), ("after", small)):
        text = generate(loaded.model, loaded.tokenizer, _PROMPT, new_tokens=40)
        console.print(f"[bold]a sample, {label}:[/bold] ", end="")
        console.print(f"{' '.join(text.split())}\n", markup=False, highlight=False)
    console.print(f"written to {output}; the same for your own model:", markup=False, highlight=False)
    console.print(
        f"  rankwise compress MODEL --output DIR --keep {keep:g} --calibration text:FILE", markup=False, highlight=False
    )
