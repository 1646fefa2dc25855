"""The commands that make a model speak, or two side by side."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rankwise.cli.common import Cache, Device, Json, Precision, Trust, decode_once, load_named, print_json

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

    from rankwise.evaluation import answer, chat_ids

    talkers: list[tuple[str, Any, list[dict[str, str]]]] = []
    for name in filter(None, (model, against)):
        loaded = load_named(name, device, precision, trust_remote_code)
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


def generate(
    model: Annotated[str, typer.Argument(help="Directory or hub name, dense or compressed.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File with a prompt a line instead.")] = None,
    against: Annotated[str | None, typer.Option(help="A second model that continues the same.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=1000, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="For a temperature above 0.")] = 0,
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Continue the prompt itself, where the model has a chat template.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    dense_cache: Cache = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Continue a prompt, or answer it where the model has a chat template; several, and two models side by side."""
    from rankwise.evaluation import generate as run
    from rankwise.evaluation import is_chat

    asked = _prompts(prompt, prompts)
    said: dict[str, list[str]] = {}
    for name in filter(None, (model, against)):
        loaded = load_named(name, device, precision, trust_remote_code)
        decode_once(loaded.model, dense_cache)
        options: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
        template = is_chat(loaded.tokenizer) and not no_template
        label = name if name not in said else f"{name} (again)"
        said[label] = [run(loaded.model, loaded.tokenizer, each, template=template, **options) for each in asked]
    if json:
        rows = [{"prompt": each, **{name: texts[i] for name, texts in said.items()}} for i, each in enumerate(asked)]
        print_json(rows)
        return
    if len(asked) == 1 and against is None:
        print(said[model][0])
        return
    for i, each in enumerate(asked):
        print(f"{'' if i == 0 else chr(10)}> {each}")
        for name, texts in said.items():
            print(f"[{name}]\n{texts[i]}")


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts that were given.

    Raises:
        RecipeError: when none is given, or both ways are taken.
        DataError: as `read_prompts`.
    """
    from rankwise.errors import RecipeError

    if (prompt is None) == (file is None):
        raise RecipeError(
            "One prompt is needed, or a file of them.", where="generate", remedy="give --prompt TEXT or --prompts FILE"
        )
    return [prompt] if prompt is not None else read_prompts(str(file))


def read_prompts(file: str) -> list[str]:
    """Prompts of a file, one a line.

    Raises:
        DataError: when the file cannot be read or holds none.
    """
    from rankwise.errors import DataError
    from rankwise.reading import UnreadableError, read_text

    try:
        found = [line for line in read_text(file).splitlines() if line.strip()]
    except UnreadableError as problem:
        raise DataError("The prompts cannot be read.", where=file, remedy=str(problem)) from None
    if not found:
        raise DataError("The file holds no prompt.", where=file, remedy="write a prompt a line")
    return found


def _line(asks: bool) -> str | None:
    """What the user says next; None at the end."""
    if asks:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def _print(piece: str) -> None:
    print(piece, end="", flush=True)
