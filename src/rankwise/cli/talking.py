"""The command that talks to a model, or to two side by side."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rankwise.cli.common import Cache, Device, Precision, Trust, decode_once

_HELP = "Say something; /new begins anew, an empty line or ^D ends."


def chat(
    model: Annotated[str, typer.Argument(help="Directory or hub name, dense or compressed.")],
    against: Annotated[str | None, typer.Option(help="A second model that answers the same.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=1000, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="For a temperature above 0.")] = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    dense_cache: Cache = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to an instruction model, each with its own memory of what was said."""
    import torch

    from rankwise.checkpoints import load_model
    from rankwise.device import named_device
    from rankwise.evaluation import answer, chat_ids
    from rankwise.recipes import recipe_from

    talkers: list[tuple[str, Any, list[dict[str, str]]]] = []
    for name in filter(None, (model, against)):
        recipe = recipe_from({"model": name, "device": device, "precision": precision}, origin="command line")
        loaded = load_model(
            name, precision=precision, device=named_device(recipe.device), trust_remote_code=trust_remote_code
        )
        # A model that cannot be talked to is known before anybody says a word.
        chat_ids(loaded.tokenizer, [{"role": "user", "content": "?"}])
        decode_once(loaded.model, dense_cache)
        talkers.append((name, loaded, []))
    asks = sys.stdin.isatty()
    if asks:
        print(_HELP, file=sys.stderr, flush=True)
    torch.manual_seed(seed)
    while (said := _line(asks)) is not None:
        if said == "/new":
            for _, _, turns in talkers:
                turns.clear()
            continue
        for name, loaded, turns in talkers:
            turns.append({"role": "user", "content": said})
            if against is not None:
                print(f"[{name}]", flush=True)
            found = answer(
                loaded.model, loaded.tokenizer, turns, _print, new_tokens=new_tokens, temperature=temperature
            )
            turns.append({"role": "assistant", "content": found})
            print(flush=True)


def _line(asks: bool) -> str | None:
    """What the user says next; None at the end."""
    if asks:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def _print(piece: str) -> None:
    print(piece, end="", flush=True)
