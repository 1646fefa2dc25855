"""What storage costs and saves in time: dense, two factors and pivot rows at Llama-2-7B's layer shapes.

python benchmarks/speed.py

On a CPU one block in float32; on a GPU, which is used when there is one, the whole shape in bfloat16 (a minute on an
H100).
Rounds take turns, and every figure is a ratio to the dense model within its round. Beside each stand the ratios of
floating-point operations and of bytes, below which no time can fall for long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from common import markdown_table, write_result
from rankwise.layers import LowRankLinear, PivotedLinear
from rankwise.models import Site, find_sites
from rankwise.sizes import Form

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
LAYERS = 32 if GPU else 1
CONTEXT = 512
KEEPS = (0.8, 0.5)
TOKENS = (1, 8, 512, 4096)
ROUNDS = 5 if GPU else 3
MULTIPLE = 8
MODES = {
    "prefill 1 x 512": (1, 512),
    "prefill 8 x 512": (8, 512),
    "decode, batch 1": (1, 1),
    "decode, batch 8": (8, 1),
}


def dense_model() -> Any:
    """Llama-2-7B's shapes with random weights: all of it on a GPU, one block and a small vocabulary on a CPU."""
    config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=32000 if GPU else 256, max_position_embeddings=4096)
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    return model.to(DTYPE).eval().requires_grad_(False)


def layer_of(site: Site, rank: int, storage: str, folded: bool) -> nn.Module:
    """A factored layer with random weights of a sensible size."""
    with torch.device(DEVICE):
        if storage == "two_factor":
            layer: Any = LowRankLinear(site.n, site.m, rank, True)
        else:
            layer = PivotedLinear(site.n, site.m, rank, True, order=not folded)
            if not folded:
                order = torch.randperm(site.m, generator=torch.Generator().manual_seed(rank), device="cpu")
                layer.place = order.to(DEVICE, torch.int32)
    return layer.to(DTYPE).eval().requires_grad_(False)


def factored(model: Any, keep: float, storage: str, ranks_of: str) -> tuple[float, dict[str, nn.Module]]:
    """Factored layers for every site; up keeps the order of its storage, as in checkpoints.

    Args:
        model: the dense model.
        keep: fraction kept by the storage `ranks_of`.
        storage: what is built.
        ranks_of: whose ranks are taken.

    Returns:
        Numbers in the layers, and the layers by name.
    """
    asked = Form.model_validate({"storage": ranks_of})
    own = Form.model_validate({"storage": storage})
    total, layers = 0, {}
    for site in find_sites(model):
        shape = (site.m, site.n)
        rank = round(asked.rank_of_numbers(shape, keep * site.parameters) / MULTIPLE) * MULTIPLE
        total += own.numbers(shape, rank)
        layers[site.name] = layer_of(site, rank, storage, folded=site.role == "up")
    return float(total), layers


@contextmanager
def in_place(model: Any, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Exchange layers of a model for as long as the block runs."""
    originals = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


class Runner:
    """Times one forward pass in each mode; a decode step has a context of 512 tokens behind it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        source = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        self.ids = {
            mode: torch.randint(0, vocabulary, shape, generator=source).to(DEVICE) for mode, shape in MODES.items()
        }
        self.filled: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def seconds(self, mode: str) -> float:
        """One pass, or the mean of as many as make up a tenth of a second."""
        decode = mode.startswith("decode")
        repeats, spent = 0, 0.0
        cache = self._cache(MODES[mode][0]) if decode else None
        while spent < 0.1 or repeats < (3 if decode else 1):
            if cache is not None:
                cache.crop(-1)
            spent += clock(self._pass, self.ids[mode], cache)
            repeats += 1
        return spent / repeats

    def _cache(self, batch: int) -> Any:
        cache = DynamicCache(config=self.model.config)
        ids = self.ids["prefill 8 x 512"][:batch]
        self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        self._pass(self.ids[f"decode, batch {batch}"], cache)
        return cache

    def _pass(self, ids: Tensor, cache: Any) -> None:
        self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)


def clock(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds, waiting for a GPU before and after."""
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(*arguments)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def limits(model: Any, mode: str, linear: float) -> tuple[float, float]:
    """Floating-point operations and bytes of one pass with `linear` numbers in the decoder's linear layers."""
    config, (batch, length) = model.config, MODES[mode]
    head = config.vocab_size * config.hidden_size
    behind = CONTEXT if mode.startswith("decode") else 0
    seen = length * behind + length * (length + 1) / 2
    attention = 4 * batch * seen * config.hidden_size * config.num_hidden_layers
    operations = 2 * batch * length * (linear + head) + attention
    cached = 2 * batch * (behind + length) * config.hidden_size * config.num_hidden_layers
    return operations, DTYPE.itemsize * (linear + head + cached)


def compare() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Every storage at equal keep and at equal rank, in turns with the dense model."""
    model = dense_model()
    runner = Runner(model)
    dense_numbers = float(sum(site.parameters for site in find_sites(model)))
    variants = [("two factors", "two_factor", "two_factor"), ("pivoted", "pivoted", "pivoted")]
    variants.append(("pivoted, ranks of two factors", "pivoted", "two_factor"))
    rows, figures = [], []
    for keep in KEEPS:
        for label, storage, ranks_of in variants:
            ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
            absolute: dict[str, list[float]] = {mode: [] for mode in MODES}
            numbers, layers = factored(model, keep, storage, ranks_of)
            for _ in range(ROUNDS):
                dense = {mode: runner.seconds(mode) for mode in MODES}
                with in_place(model, layers):
                    for mode in MODES:
                        absolute[mode].append(runner.seconds(mode))
                        ratios[mode].append(absolute[mode][-1] / dense[mode])
            cells = [f"{label}, keep {keep}" if storage == ranks_of else f"{label} at {keep}"]
            for mode in MODES:
                before, after = limits(model, mode, dense_numbers), limits(model, mode, numbers)
                bound = tuple(b / a for a, b in zip(before, after, strict=True))
                time_ratio = statistics.median(ratios[mode])
                cells.append(f"{time_ratio:.2f} ({bound[0]:.2f} / {bound[1]:.2f})")
                figures.append(
                    {
                        "variant": label,
                        "keep": keep,
                        "mode": mode,
                        "ratio": time_ratio,
                        "all": ratios[mode],
                        "seconds": statistics.median(absolute[mode]),
                        "operations_ratio": bound[0],
                        "bytes_ratio": bound[1],
                    }
                )
            rows.append(cells)
            print(*cells, sep=" | ", flush=True)
    return rows, figures


def separate(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """One product a weight."""
    return [linear(x, weight) for weight in weights]


@torch.inference_mode()
def parts() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """What one pivoted layer [4096, 4096] does beside its two products, and ways to do it; milliseconds."""
    m = n = 4096
    rank = round(Form(storage="pivoted").rank_of_numbers((m, n), 0.5 * m * n))
    first, rest = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in ((rank, n), (m - rank, rank)))
    place = torch.randperm(m, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32)
    stacked = torch.cat([first, first, first])
    figures: list[dict[str, Any]] = []
    for tokens in TOKENS:
        x, ready = (torch.randn(tokens, n, device=DEVICE, dtype=DTYPE) for _ in range(2))

        def one_buffer(x: Tensor = x) -> Tensor:
            out = x.new_empty(len(x), m)
            torch.mm(x, first.T, out=out[:, :rank])
            torch.mm(out[:, :rank], rest.T, out=out[:, rank:])
            return out

        def products(x: Tensor = x) -> Tensor:
            return linear(linear(x, first), rest)

        def joined(x: Tensor = x) -> Tensor:
            code = linear(x, first)
            return torch.cat([code, linear(code, rest)], -1)

        def by_gather(ready: Tensor = ready) -> Tensor:
            return ready.gather(-1, place.long().expand(ready.shape))

        ways: dict[str, Callable[[], Any]] = {
            "the two products": products,
            "products and joining": joined,
            "products into one buffer": one_buffer,
            "order by indexing": partial(ready.__getitem__, (..., place)),
            "order by index_select": partial(ready.index_select, -1, place),
            "order by gather": by_gather,
            "three first factors": partial(separate, x, [first] * 3),
            "three first factors as one": partial(linear, x, stacked),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                repeats, spent = 0, 0.0
                while spent < 0.05 or repeats < 2:
                    spent += clock(way)
                    repeats += 1
                found[name].append(1000 * spent / repeats)
        figures.append({"tokens": tokens, "milliseconds": {k: statistics.median(v) for k, v in found.items()}})
    names = list(figures[0]["milliseconds"])
    return [[name, *(f"{f['milliseconds'][name]:.3g}" for f in figures)] for name in names], figures


def main() -> None:
    rows, figures = compare()
    part_rows, part_figures = parts()
    what = "the whole shape, bfloat16" if GPU else "one block, float32"
    body = (
        f"Llama-2-7B's shapes, {what}: seconds over the dense model's, median of {ROUNDS} rounds; in brackets the "
        "ratios of operations and of bytes.\n\n"
    )
    body += markdown_table(["", *MODES], rows)
    body += "\n\nParts of one pivoted layer [4096, 4096] at keep 0.5, and other ways to do them, milliseconds:\n\n"
    body += markdown_table(["tokens", *map(str, TOKENS)], part_rows)
    everything = {"models": figures, "parts": part_figures}
    name = f"speed-{'gpu' if GPU else 'cpu'}"
    write_result(name, "Speed of storage", "python benchmarks/speed.py", body, everything)


if __name__ == "__main__":
    main()
