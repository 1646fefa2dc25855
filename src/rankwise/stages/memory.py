"""What a run will need, estimated from its recipe and the model's config alone, and which way the model is held."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.allocation import Looks
from rankwise.checkpoints import empty_model
from rankwise.device import named_device, planned_device
from rankwise.errors import ModelError, RankwiseError
from rankwise.layers import vocabulary_parts
from rankwise.models import LOGITS, Site, decoder_blocks, find_sites, share_inputs, text_config, unfuse_experts
from rankwise.progress import Reporter
from rankwise.recipes import Recipe
from rankwise.stages.at_once import most_together, rounded_at_once
from rankwise.stages.chosen import left_out, watched
from rankwise.statistics import HIDDEN_GB, Statistic, Sums
from rankwise.statistics.symmetric import lower_numbers

MODES = ("whole", "blocks", "disk")

_SHARE = 0.9
"""Of the memory that is free, how much a run may be expected to take."""

_LENGTH = 512
_SEQUENCES = 128
"""Taken where a recipe leaves them to the text, which is not read here."""

_LIBRARIES = 0.37e9
_LIBRARIES_BESIDE_A_GPU = 1.2e9
"""PyTorch and transformers, imported and run once."""

_TAKEN = 4
"""Memory of the host while a total comes from the GPU, in sizes of its file; fitted."""

_SOLVER = 2
"""Of what a decomposition takes on a CPU, how much it takes on a GPU."""

_LOGITS_AT_ONCE = 7
"""Tensors of the size of the logits of one part, in float32, while a loss and its gradient are taken."""


@dataclass(frozen=True)
class Need:
    """What a run needs with its model held in one way, in bytes.

    Attributes:
        mode: `whole`, `blocks` or `disk`.
        host: memory of the host that no file stands behind, at the worst moment.
        device: memory of the GPU; 0 on a CPU.
        disk: files of the run's directory and the checkpoint.
        worst: the stage of that moment; on a GPU, of most memory there.
    """

    mode: str
    host: int
    device: int
    disk: int
    worst: str


@dataclass(frozen=True)
class Vocabulary:
    """What becomes of embeddings and head.

    Attributes:
        saved: bytes that they are smaller by in the checkpoint.
        v: rows of the head.
        rank: of the two factors in place of the head; 0 for none.
    """

    saved: int = 0
    v: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Shapes:
    """What the estimate is made of: numbers, unless bytes are said.

    Attributes:
        sites: linear weights, those that share an input marked.
        outside: numbers outside the blocks.
        blocks: numbers of each block.
        width: of hidden states.
        stored: bytes of a number in the checkpoint.
        computed: bytes of a number while it computes.
        sums: by block, bytes that its statistics take while they are summed, forward or on the way back.
        totals: bytes of all statistics in files.
        largest_total: of the largest file.
        sequences: calibration sequences.
        length: tokens of each.
        batch: sequences a batch.
        gradients: at how many of them gradients are taken; 0 without a backward pass.
        keep: of the sites' bits, how many are kept.
        vocabulary: what becomes of embeddings and head.
        on_gpu: whether it computes on a GPU.
        codes: whether weights are rounded to codes.
        rounded: how many are at once where the model is whole.
        together: whether small ones are fitted in groups.
    """

    sites: Sequence[Site]
    outside: int
    blocks: Sequence[int]
    width: int
    stored: int
    computed: int
    sums: Sequence[int]
    totals: int
    largest_total: int
    sequences: int
    length: int
    batch: int
    gradients: int
    keep: float
    on_gpu: bool
    vocabulary: Vocabulary
    codes: bool
    rounded: int
    together: bool


def _summed(sums: Sums) -> int:
    """Bytes of what sums hold."""
    return sum(v.numel() * v.itemsize for v in vars(sums).values() if isinstance(v, torch.Tensor))


def _filed(sums: Sums) -> int:
    """Bytes of the file that they become: float64, of square matrices about one half."""
    shapes = [tuple(v.shape) for v in vars(sums).values() if isinstance(v, torch.Tensor)]
    square = [shape for shape in shapes if len(shape) >= 2 and shape[-1] == shape[-2]]
    halves = sum(math.prod(shape[:-2]) * lower_numbers(shape[-1]) for shape in square)
    return 8 * (halves + sum(math.prod(shape) for shape in shapes if shape not in square))


def shapes_of(recipe: Recipe) -> Shapes:
    """What a recipe's estimate is made of; errors as for `empty_model`."""
    model = empty_model(recipe.model, recipe.trust_remote_code)
    # As it is held: what becomes of fused experts are views of it.
    inside = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)[1]]
    everything = sum(p.numel() for p in model.parameters())
    unfuse_experts(model)
    sites = find_sites(model)
    # Some forwards look at values, which are not there; then no site shares an input.
    with contextlib.suppress(Exception):
        sites = share_inputs(model, sites, torch.zeros(1, 8, dtype=torch.long, device="meta")) or sites
    _, blocks = decoder_blocks(model)
    requests = recipe.method.requests()
    if recipe.allocation.looks >= Looks.LOSSES:
        requests += recipe.method.plan_requests()
    block_of = {site.name: site.block for site in sites}
    calibration = recipe.calibration
    device = planned_device(recipe.device)
    count = calibration.counted(device.type) or _SEQUENCES
    measured = watched(sites, left_out(sites, recipe.include, recipe.exclude))
    forward: dict[Any, _Size] = {}
    back: dict[Any, _Size] = {}
    for statistic in requests:
        (forward if statistic.labels is None else back).update(_sizes(statistic, measured, count))
    sums = [0] * len(blocks)
    for way in (forward, back):
        by_block: dict[int, list[_Size]] = {}
        for (*_, first), size in way.items():
            by_block.setdefault(block_of[first], []).append(size)
        for block, sizes in by_block.items():
            sums[block] = max(sums[block], _summing(sizes))
    backward = any(statistic.labels is not None for statistic in requests)
    stored = (getattr(model.config, "dtype", None) or torch.float32).itemsize
    widens = recipe.precision == "float32" or (recipe.precision == "auto" and device.type == "cpu")
    context = getattr(text_config(model.config), "max_position_embeddings", None) or _LENGTH
    weights = sum(site.parameters for site in sites)
    budget = recipe.budget
    keep = budget.keep if budget.keep is not None else 1.0
    if budget.bits is not None:
        keep = budget.bits / (8 * stored)
    elif budget.size is not None:
        keep = min(1.0, budget.size / (stored * max(1, weights)))
    return Shapes(
        sites=sites,
        outside=everything - sum(inside),
        blocks=inside,
        width=model.get_input_embeddings().weight.shape[-1],
        stored=stored,
        computed=4 if widens else stored,
        sums=sums,
        totals=sum(size.filed for size in (forward | back).values()),
        largest_total=max((size.filed for size in (forward | back).values()), default=0),
        sequences=count,
        length=calibration.length or min(_LENGTH, context),
        batch=calibration.batch_size,
        gradients=calibration.gradients_at(count, device.type) if backward else 0,
        keep=keep,
        on_gpu=device.type != "cpu",
        codes=recipe.method.rounds,
        rounded=rounded_at_once(recipe.method, sites, device.type != "cpu", "whole"),
        together=recipe.method.together,
        vocabulary=_vocabulary(recipe, model, stored),
    )


def _vocabulary(recipe: Recipe, model: Any, stored: int) -> Vocabulary:
    if recipe.embeddings is None and recipe.head is None:
        return Vocabulary()
    budget = recipe.budget
    coded = recipe.head == "8bit"
    parts = vocabulary_parts(model, recipe.embeddings is not None, coded, recipe.head_keep, budget.rank_multiple)
    after = parts.stored_bytes(model, dict.fromkeys(dict(model.named_parameters(remove_duplicate=False)), stored))
    before = sum(model.get_parameter(name).numel() * stored for name in after)
    return Vocabulary(before - sum(after.values()), len(model.get_output_embeddings().weight), parts.rank or 0)


@dataclass(frozen=True)
class _Size:
    """Of the sums of one stream: bytes in float32, bytes of their file, and whether they are added in place."""

    summed: int
    filed: int
    in_place: bool


def _summing(sizes: Sequence[_Size]) -> int:
    """Bytes that sums of a block take: in float32, their totals in float64, and what adding one of them makes."""
    adding = (size.summed if size.in_place else 4 * size.summed for size in sizes)
    return 3 * sum(size.summed for size in sizes) + max(adding)


def _sizes(statistic: Statistic, sites: Sequence[Site], sequences: int) -> Mapping[Any, _Size]:
    """What sums of each stream take: by module, side, and the first site that it serves."""
    streams = statistic.streams(sites)
    start = statistic.sums(streams, sequences, Reporter(show=False))
    nowhere = torch.device("meta")
    begun = {(s.module, s.side, s.sites[0]): start(s.d, nowhere) for s in streams}
    return {
        key: _Size(_summed(sums), _filed(sums), type(sums).add_to is not Sums.add_to) for key, sums in begun.items()
    }


def needs(shapes: Shapes) -> dict[str, Need]:
    """What every way to hold the model needs, the largest first."""
    return {mode: _need(shapes, mode) for mode in MODES}


def _need(s: Shapes, mode: str) -> Need:
    tokens = s.batch * s.length
    # What passes through the blocks, and what lies between them where gradients come back.
    hidden = 4 * s.length * s.width * (s.sequences + s.gradients * (len(s.blocks) + 2))
    in_memory = hidden if mode != "disk" and hidden <= HIDDEN_GB * 1e9 else 0
    largest_block = max(s.blocks)
    widened = s.computed != s.stored
    whole = (s.outside + sum(s.blocks)) * s.computed
    streamed = largest_block * s.computed if widened or s.on_gpu else 0
    weights = {"whole": whole if widened else 0}.get(mode, streamed)
    by_block: dict[int, list[Site]] = {}
    for site in s.sites:
        by_block.setdefault(site.block, []).append(site)
    passing = max(sum(site.m + site.n for site in sites) for sites in by_block.values())
    activations = s.computed * tokens * (passing + 6 * s.width if s.gradients else s.width * 6)
    sums = max(s.sums)
    logits = _LOGITS_AT_ONCE * 4 * LOGITS
    at_once = s.rounded if mode == "whole" else 1
    looking = max(_looking(site, s.codes) for site in s.sites) * at_once
    fitting = int(at_once * most_together(s.sites, at_once)) if s.together else 0
    made = int(s.keep * sum(site.parameters for site in s.sites)) * 4 if mode == "whole" and not widened else 0
    disk = _disk(s, mode, hidden - in_memory)
    stages = {
        "statistics": activations + in_memory + max(sums, logits if s.gradients else 0),
        "outlooks": looking,
        "fits": fitting,
        "head": _fitting_head(s.vocabulary, s.width),
        "scores": s.computed * tokens * 6 * s.width + logits // 2,
    }
    if s.on_gpu:
        held = whole if mode == "whole" else s.outside * s.computed + streamed
        stages["statistics"] = max(activations + sums, logits + 8 * tokens * s.width if s.gradients else 0)
        stages["outlooks"] = _SOLVER * looking
        worst = max(stages, key=lambda name: stages[name])
        host = max(in_memory + _TAKEN * s.largest_total, made)
        return Need(mode, int(_LIBRARIES_BESIDE_A_GPU + host), held + stages[worst], disk, worst)
    worst = max(stages, key=lambda name: stages[name])
    return Need(mode, int(_LIBRARIES + made + weights + stages[worst]), 0, disk, worst)


def _looking(site: Site, codes: bool) -> int:
    """Bytes that the decomposition of one weight takes: in float64, its side's eigenproblem and copies of it; and where
    it becomes codes, H, what it is turned into, and its factor.
    """
    k = min(site.m, site.n)
    return 8 * ((8 * site.n * site.n + 3 * site.m * site.m if codes else 0) + 5 * k * k) + 44 * site.m * site.n


def _fitting_head(made: Vocabulary, width: int) -> int:
    """Bytes that two factors in place of the head take: matrices of its width in float64, L in float32 and in parts."""
    return 8 * (11 * width * width + made.v * made.rank) if made.rank else 0


def _disk(s: Shapes, mode: str, hidden: int) -> int:
    """Totals, bases in float32, hidden states that do not stay in memory, weights in files, the result."""
    bases = sum(4 * min(site.m, site.n) * (site.m + site.n) for site in s.sites)
    linear = sum(site.parameters for site in s.sites)
    rest = s.stored * (s.outside + sum(s.blocks) - linear) - s.vocabulary.saved
    written = rest + int(s.keep * linear * s.stored)
    held = 0 if mode == "whole" else s.computed * s.outside + int(s.keep * linear) * 4
    return s.totals + bases + hidden + held + written


def available_memory() -> int | None:
    """Memory of the host that is free, in bytes: what the system says, or what the process's group may take."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            found.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def expected_need(recipe: Recipe, reporter: Reporter) -> Need | None:
    """The way a recipe's model will be held and what that needs, said on the terminal; None for what cannot be known.

    Args:
        recipe: the whole run.
        reporter: told about it.
    """
    try:
        found = needs(shapes_of(recipe))
    except (RankwiseError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, OSError):
        return None  # loading the model says what is wrong with it
    free = available_memory()
    free_on_device = math.inf
    device = named_device(recipe.device)
    if device.type == "cuda":
        free_on_device = torch.cuda.mem_get_info(device)[0]
    fitting = (
        mode
        for mode, need in found.items()
        if (free is None or need.host <= _SHARE * free) and need.device <= _SHARE * free_on_device
    )
    need = found[next(fitting, "disk") if recipe.memory == "auto" else recipe.memory]
    of_free = "" if free is None else f" of {free / 1e9:.1f} GB that are free"
    if free is not None and need.host > free:
        of_free += " (more than is free: the system may end it)"
    reporter.say(f"memory: {need.mode}, about {need.host / 1e9:.1f} GB{of_free}, {need.disk / 1e9:.1f} GB of disk")
    return need


def chosen_memory(recipe: Recipe, need: Need | None) -> str:
    """The way the model is held: the recipe's, else the estimate's, else whole."""
    if recipe.memory != "auto":
        return recipe.memory
    if recipe.method.prunes:
        return "whole"
    return "whole" if need is None else need.mode


def require_config(recipe: Recipe) -> dict[str, Need]:
    """What every way needs, from a config.

    Raises:
        ModelError: when nothing can be said of this architecture without its weights.
    """
    try:
        return needs(shapes_of(recipe))
    except RankwiseError:
        raise
    except Exception as problem:
        raise ModelError(
            f"What this architecture needs cannot be told from its config ({type(problem).__name__}: {problem}).",
            where=recipe.model,
            remedy="compress it with --memory disk, which needs least",
        ) from None
