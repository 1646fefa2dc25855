"""The commands that count and time: what running a model takes, and how fast it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.common import (
    Cache,
    Device,
    Json,
    Precision,
    Quiet,
    Trust,
    decode_once,
    load_named,
    print_json,
    reporter_for,
)

if TYPE_CHECKING:
    from rankwise.evaluation import Operations


def cost(
    model: Annotated[str, typer.Argument(help="Directory or hub name, dense or compressed; its config is read alone.")],
    plan: Annotated[Path | None, typer.Option(help="A plan: what the dense model would be under it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the pass that is counted.")] = 64,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Count parameters, operations, bytes and the cache of keys and values, without weights and at once."""
    from rankwise.evaluation import count_operations

    dense, stored = _counted(model, trust_remote_code)
    found = {model: count_operations(dense, stored, tokens=tokens)}
    if plan is not None:
        from pydantic import ValidationError

        from rankwise.errors import BudgetError
        from rankwise.methods import METHODS
        from rankwise.models import find_sites
        from rankwise.sizes import Plan

        given = Plan.load(plan)
        given.fitting(find_sites(dense), str(plan))
        method = METHODS.get(given.method)
        settings = given.method_settings
        try:
            biased = bool(settings.get("bias")) if method is None else method(**settings).adds_bias
        except ValidationError:
            raise BudgetError(
                f"The plan's settings of {given.method} are none that it has.",
                where=str(plan),
                remedy="use the version of rankwise that wrote it",
            ) from None
        found[str(plan)] = count_operations(dense, stored, tokens=tokens, plan=given, adds_bias=biased)
    if json:
        print_json({name: asdict(each) for name, each in found.items()})
        return
    from rankwise.reports import print_operations

    print_operations(found)


def _counted(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model without weights, its experts taken apart, and the type of its numbers: what `count_operations` takes."""
    import torch

    from rankwise.checkpoints import empty_model
    from rankwise.models import unfuse_experts

    model = empty_model(name, trust_remote_code)
    unfuse_experts(model)
    dtype = getattr(model.config, "dtype", None)
    return model, dtype if isinstance(dtype, torch.dtype) else torch.float32


def speed(
    model: Annotated[str, typer.Argument(help="Directory or hub name, dense or compressed.")],
    against: Annotated[str | None, typer.Option(help="A second model, such as the original, timed in turns.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens generated a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one that warms up.")] = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    dense_cache: Cache = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time reading a prompt and generating, two models in turns, beside the ratio of operations and bytes."""
    import torch

    from rankwise.errors import DataError
    from rankwise.evaluation import count_operations, measure_speeds

    reporter = reporter_for(quiet)
    models: dict[str, Any] = {}
    costs: dict[str, Operations] = {}
    for name in filter(None, (model, against)):
        with reporter.stage(f"load {name}"):
            loaded = load_named(name, device, precision, trust_remote_code)
        if loaded.context is not None and prompt + tokens > loaded.context:
            raise DataError(
                f"A prompt of {prompt} tokens and {tokens} new ones are beyond the model's context of "
                f"{loaded.context}.",
                where=name,
                remedy="make --prompt or --tokens smaller",
            )
        label = name if name not in models else f"{name} (again)"
        costs[label] = count_operations(*_counted(name, trust_remote_code))
        decode_once(loaded.model, dense_cache, quiet)
        models[label] = loaded.model
    smallest = min(m.get_input_embeddings().num_embeddings for m in models.values())
    ids = torch.randint(0, smallest, (prompt,), generator=torch.Generator().manual_seed(0))
    with reporter.stage("speed"):
        found = measure_speeds(models, ids, tokens=tokens, rounds=rounds, reporter=reporter)
    if json:
        print_json({name: {**asdict(each), "cost": asdict(costs[name])} for name, each in found.items()})
        return
    from rankwise.reports import print_speeds

    print_speeds(found, costs)
