"""Codebooks on Gaussians, scales under feedback, and the time of one LDLQ pass at 4096 x 4096.

python benchmarks/codebooks.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import markdown_table, shared_directory, write_result
from methods import protocols
from rankwise import stages
from rankwise.checkpoints import load_model
from rankwise.device import best_device
from rankwise.progress import Reporter
from rankwise.quantizers import (
    Codebook,
    Hessian,
    OutputFeedback,
    Rotation,
    Target,
    codebook_named,
    ldlq,
    round_along_both,
    weighed_error,
)
from rankwise.quantizers.codes import (
    SECOND_SCALE,
    decode,
    e8_short_values,
    e8p_patterns,
    e8p_values,
    tables_for,
    tile_of,
)
from rankwise.quantizers.lattice import nearest_e8p, nearest_short, round_e8p
from rankwise.recipes import recipe_from
from rankwise.runs import Run
from rankwise.statistics.input_moments import InputMoments

COUNT = 1_000_000
SIDE = 4096


def error_at(scale: float, x: Tensor, bits: int) -> float:
    """Mean squared error of the lattice at one scale."""
    values = decode(round_e8p(x / scale, bits).unsqueeze(1), "e8p", tables_for("e8p", bits))
    return float((x - scale * values).square().mean())


def best(scales: list[float], error: Callable[[float], float]) -> tuple[float, float]:
    """Least error and where."""
    return min((error(scale), scale) for scale in scales)


def second_scales(x: Tensor) -> list[list[str]]:
    """Errors of 3 and 4 bits over the scale of the second codeword, the first at its own best scale each time."""
    rows = []
    first = e8p_patterns()
    for bits, tried in ((3, (0.43, 0.46, 0.49, 0.52)), (4, (0.255, 0.265, 0.275, 0.285, 0.3))):
        for second in tried:

            def error(scale: float, second: float = second, bits: int = bits) -> float:
                unit = x / scale
                near = e8p_values(nearest_e8p(unit), first)
                rest = (unit - near) / second
                table = e8_short_values()[nearest_short(rest)] if bits == 3 else e8p_values(nearest_e8p(rest), first)
                return float((x - scale * (near + second * table)).square().mean())

            low, at = best([0.98, 1.02, 1.06, 1.1, 1.14], error)
            mark = " (used)" if second == SECOND_SCALE[bits] else ""
            rows.append([str(bits), f"{second:g}{mark}", f"{low:.5f}", f"{at:g}"])
    return rows


FACTORS = (1.0, 1.03, 1.08, 1.15, 1.25)


def feedback_rows() -> list[list[str]]:
    """Error of LDLQ over what scales are multiplied by: mean over every fifth site of wiki-llama-8m."""
    shared = shared_directory()
    calibration, _ = protocols("wiki-llama-8m", shared)
    recipe = recipe_from(
        {"model": str(shared / "models" / "wiki-llama-8m"), "calibration": calibration, "method": "quantize"}
        | {"budget": {"bits": 2.5}, "allocation": "uniform"}
    )
    reporter = Reporter(show=False)
    loaded = load_model(recipe.model)
    kinds = (("e8p", 2), ("e8p", 3), ("e8p", 4), ("uniform", 2))
    totals: dict[tuple[str, int, float], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = stages.read_texts(recipe, loaded, reporter, validate=False)
        work = stages.begin(recipe, Run(Path(folder)), loaded, texts, reporter)
        store = stages.collect_statistics(work)
        sites = work.sites[::5]
        for site in sites:
            weight, seen = stages.weight_and_statistics(work, store, site)
            rotation = Rotation.drawn(site.m, site.n, stages.draw_for(work, site))
            hessian = Hessian(rotation.hessian(Hessian.of(seen.of(InputMoments()).second_moment(), 0.01).matrix), 0.01)
            target, feedback = rotation.weight(weight), hessian.feedback(tile_of("e8p")[1])
            for name, bits in kinds:
                codebook = codebook_named(name, bits, by_row=True)
                for factor in FACTORS:
                    missed = target - ldlq(target, feedback, codebook, codebook.scales(target) * factor).dense()
                    error = weighed_error(missed, hessian.matrix) / weighed_error(target, hessian.matrix)
                    totals[name, bits, factor] = totals.get((name, bits, factor), 0.0) + error / len(sites)
    return [[name, str(bits), *(f"{totals[name, bits, f]:.5f}" for f in FACTORS)] for name, bits in kinds]


def pass_seconds() -> list[tuple[str, int, float]]:
    """Seconds of one LDLQ pass over a matrix of 4096 x 4096, and of one that feeds errors back along outputs too."""
    device = best_device()
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * SIDE, SIDE, generator=source).to(device)
    hessian = Hessian.of((inputs.T @ inputs / len(inputs)).double(), 0.01)
    weight = torch.randn(SIDE, SIDE, generator=source).to(device).double()
    started = time.perf_counter()
    feedback = hessian.feedback(tile_of("e8p")[1])
    rows = [("factor of H", 0, time.perf_counter() - started)]
    outputs = OutputFeedback.of(hessian.matrix, 0.5)
    for name, bits in (("e8p", 2), ("e8p", 3), ("e8p", 4), ("uniform", 2)):
        codebook = codebook_named(name, bits, by_row=True)
        scale = codebook.scales(weight, feedback=True)
        for label, along in ((name, None), (f"{name}, two sides", outputs.feedback)):
            # Tables are made and kernels chosen before the clock runs.
            _pass(weight[:64], feedback, codebook, scale[:64], None if along is None else along[:64, :64])
            started = time.perf_counter()
            _pass(weight, feedback, codebook, scale, along)
            rows.append((label, bits, time.perf_counter() - started))
    return rows


def _pass(weight: Tensor, feedback: Tensor, codebook: Codebook, scale: Tensor, along: Tensor | None) -> None:
    if along is None:
        ldlq(weight, feedback, codebook, scale)
    else:
        round_along_both(Target(weight, feedback, scale), along, codebook)
    if weight.is_cuda:
        torch.cuda.synchronize()


def pass_table(timed: list[tuple[str, int, float]]) -> str:
    """What `pass_seconds` gave, for people."""
    rows = [[name, bits or "", f"{seconds:.1f}"] for name, bits, seconds in timed]
    return markdown_table(["", "bits", f"seconds at {SIDE} x {SIDE}"], rows)


def main() -> None:
    x = torch.randn(COUNT, 8, generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {}
    scales = [0.94, 0.955, 0.965, 0.975, 1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.12, 1.14]
    rows = []
    for bits in (2, 3, 4):
        low, at = best(scales, lambda scale, bits=bits: error_at(scale, x, bits))  # type: ignore[misc]
        cells = [f"{bits}", f"{low:.4f} at {at:g}"]
        for name in ("uniform", "nf"):
            codebook = codebook_named(name, bits)
            levels = x[:65536].reshape(1, -1)

            def error(scale: float, codebook: Any = codebook, values: Tensor = levels) -> float:
                return float((values - scale * codebook.levels()[codebook._index(values / scale)]).square().mean())

            found, where = best([0.02 * k for k in range(5, 160)], error)
            cells.append(f"{found:.4f} at {where:.2f}")
        rows.append(cells)
        figures[f"gaussian {bits}"] = cells
    gaussian = markdown_table(["bits", "e8p", "uniform, best scale", "nf, best scale"], rows)
    seconds = markdown_table(["second scale, bits", "scale", "error", "first scale"], second_scales(x[:200_000]))
    feedback = feedback_rows()
    fed = markdown_table(["codebook", "bits", *(f"x {f}" for f in FACTORS)], feedback)
    timed = pass_seconds()
    figures |= {"feedback": feedback, "seconds": timed}
    clock = pass_table(timed)
    body = (
        f"Mean squared error on {COUNT:,} Gaussian vectors of eight (scalar codebooks: 65,536 x 8 numbers), at the "
        f"best scale of those tried.\n\n{gaussian}\n\nScale of the second codeword, 200,000 vectors.\n\n{seconds}\n\n"
        f"Scales times a factor under feedback: relative error of LDLQ, mean over every "
        f"fifth site of wiki-llama-8m, scales by rows.\n\n{fed}\n\n"
        f"One LDLQ pass.\n\n{clock}"
    )
    write_result("codebooks", "Codebooks and LDLQ", "python benchmarks/codebooks.py", body, figures)


if __name__ == "__main__":
    main()
