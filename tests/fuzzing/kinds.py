"""Every kind of input: how valid ones are made invalid, and who reads them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import save
from transformers import AutoTokenizer

from fuzzing import mutations as other
from rankwise.checkpoints import load_model
from rankwise.checkpoints.verify import read_config, tensor_names, verify_checkpoint
from rankwise.cli.options import recipe_of
from rankwise.data import load_examples, parse_source, windows
from rankwise.quickstart import MODEL
from rankwise.recipes import FineTune, finetune_from, read_recipe, ready_recipes, recipe_from
from rankwise.reports import Report, closing_table, model_card, plan_difference, plan_facts, plan_table, verdict
from rankwise.sizes import Plan

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "written-by-0.1.0"
_VOCABULARY = 2048


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: of it.
        make: an input, mostly invalid, drawn by a generator.
        read: takes it, or raises a `RankwiseError`.
        share: how often it is tried, relative to the others.
    """

    name: str
    make: Callable[[Random], Any]
    read: Callable[[Any], None]
    share: int = 10


def _print(thing: Any) -> None:
    Console(file=io.StringIO(), width=100).print(thing)


def _written(folder: Path, name: str) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write


def recipes(folder: Path) -> Kind:
    """Recipes as YAML files: changed as text, and as values."""
    texts = list(ready_recipes().values())
    whole = recipe_from({"model": "M", **read_recipe("lord-20")}).model_dump(mode="json")
    texts.append(yaml.safe_dump(whole))
    file = _written(folder, "recipe.yaml")
    bombs = [
        "a: &a [x, x]\n"
        + "".join(f"{n}: &{n} [*{p}, *{p}, *{p}]\n" for p, n in zip("abcdefghi", "bcdefghij", strict=True)),
        "method: &m {name: svd}\nbudget: {<<: *m}\n",
        "model: &a\n  b: *a\n",
        "a: " * 200 + "b",
        "? [a]\n: b\n",
        "1: 2\n",
        "yes: no\n",
        "method:\nbudget:\nallocation:\nrepair: {steps: }\n",
        "seed: 2026-01-01\n",
        "model: !!binary aaaa\n",
        "method: 0b_\n",
    ]

    def make(random: Random) -> bytes:
        deed = random.randrange(8)
        if deed == 0:
            return other.other_bytes(random, random.choice(bombs).encode())
        if deed == 1:
            return random.choice(bombs).encode()
        text = random.choice(texts)
        if deed < 4:
            return other.other_bytes(random, text.encode())
        return other.as_json(random, other.other_value(random, yaml.safe_load(text)))

    def read(content: bytes) -> None:
        recipe_from({"model": "M", **read_recipe(str(file(content)))}, origin="recipe.yaml")

    return Kind("recipes (YAML)", make, read)


_PATHS = [
    *("model", "output", "method", "method.name", "method.damping", "method.q_bits", "allocation", "allocation.space"),
    *("allocation.trials", "budget.keep", "budget.size", "repair.steps", "repair.blocks.epochs", "seed", "device"),
    *(
        "evaluation.source",
        "calibration.length",
        "validation.bos",
        "name",
        "x",
        "",
        ".",
        "method.",
        "a.b.c.d",
        "budget",
    ),
    *("trust_remote_code", "objective.kl_weight", "repair", "calibration.source.x", "max_shard_size", "precision"),
]


def options(folder: Path) -> Kind:
    """Options of `compress` over a recipe: `--set`, plans, names of methods."""
    ready = [None, *ready_recipes(), "nothing", "x" * 300, str(folder)]
    plan = str(FIXTURES / "pivoted" / "plan.json")

    def value(random: Random) -> str:
        if random.random() < 0.6:
            return random.choice(other.WORDS)
        return other.other_bytes(random, other.as_json(random, other.any_value(random))).decode(
            "utf-8", "surrogateescape"
        )

    sensible = [
        *("method.damping=1e-3", "budget.rank_multiple=1", "repair.steps=refit,blocks", "repair.steps=", "seed=3"),
        *("calibration.length=16", "evaluation.source=bundled", "allocation.trials=7", "calibration.bos=never"),
    ]

    def make(random: Random) -> dict[str, Any]:
        if random.random() < 0.3:
            return {
                "given": {"model": "M", "output": "O"},
                "plan": random.choice([None, plan]),
                "trials": None,
                "few": {},
                "recipe": random.choice(ready[:-3]),
                "assignments": [*random.choices(sensible, k=2), random.choice(_PATHS) + "=" + value(random)],
            }
        given = {random.choice(_PATHS[:-2]) or "model": value(random) for _ in range(random.randrange(3))}
        given = {key: given[key] for key in given if key.count(".") < 2 and not key.endswith(".")}
        return {
            "given": {"model": "M", "output": "O", **given},
            "recipe": random.choice(ready),
            "plan": random.choice([None, None, plan, "nowhere", "\0"]),
            "trials": random.choice([None, None, 5, -1]),
            "few": {"q_bits": random.choice([None, None, 2, -1, 10**30]), "rank": random.choice([None, 4])},
            "assignments": [
                random.choice(_PATHS) + random.choice(["=", "=", "=", "", "=="]) + value(random)
                for _ in range(random.randrange(4))
            ],
        }

    return Kind("options (--set and others)", make, lambda drawn: _ignored(recipe_of(**drawn)), 20)


def _ignored(_value: Any) -> None:
    pass


def finetunings(_folder: Path) -> Kind:
    """Options of `finetune`, and settings of its methods."""
    fields = [*FineTune.model_fields, "x", ""]

    def make(random: Random) -> tuple[dict[str, Any], dict[str, Any]]:
        values = {random.choice(fields): other.any_value(random) for _ in range(random.randrange(3))}
        settings = {
            random.choice(["loss", "epochs", "lr", "batch_size", "rank", "x", ""]): other.any_value(random)
            for _ in range(random.randrange(3))
        }
        return {"model": "M", "data": "text:x", "output": "O", **values}, settings

    return Kind("options (finetune)", make, lambda drawn: _ignored(finetune_from(*drawn)), 5)


def plans(folder: Path) -> Kind:
    """plan.json of two formats, and what is printed of it."""
    valid = [path.read_bytes() for path in sorted(FIXTURES.glob("*/plan.json"))]
    first = folder / "valid.json"
    first.write_text(Plan.load(FIXTURES / "quantized" / "plan.json").model_dump_json())
    valid.append(first.read_bytes())
    file = _written(folder, "plan.json")

    def read(content: bytes) -> None:
        plan = Plan.load(file(content))
        _ = plan.kept, plan.bits_a_weight, plan_facts(plan), plan.fractions()
        _print(plan_table(plan))
        _print(plan_difference(plan, plan))

    return Kind("plan.json", lambda random: other.other_json(random, random.choice(valid)), read)


def reports(folder: Path) -> Kind:
    """rankwise_report.json, and the card and table made of it."""
    valid = [path.read_bytes() for path in sorted(FIXTURES.glob("*/rankwise_report.json"))]
    valid += [path.read_bytes() for path in sorted(FIXTURES.glob("reports/*.json"))]
    file = _written(folder, "report.json")

    def read(content: bytes) -> None:
        report = Report.load(file(content))
        model_card(report)
        verdict(report)
        _print(closing_table(report))
        report.save(folder / "again.json")

    return Kind("rankwise_report.json", lambda random: other.other_json(random, random.choice(valid)), read)


def _checkpoint(folder: Path, source: str) -> Path:
    copied = folder / source
    if not copied.exists():
        shutil.copytree(FIXTURES / source, copied)
    return copied


def configs(folder: Path) -> Kind:
    """config.json of dense and compressed checkpoints, checked as before loading."""
    valid = {name: (FIXTURES / name / "config.json").read_bytes() for name in ("source", "pivoted", "quantized")}
    places = {name: _checkpoint(folder, name) for name in valid}

    def make(random: Random) -> tuple[str, bytes]:
        name = random.choice(list(valid))
        return name, other.other_json(random, valid[name])

    def read(drawn: tuple[str, bytes]) -> None:
        name, content = drawn
        (places[name] / "config.json").write_bytes(content)
        read_config(places[name])

    return Kind("config.json, checked", make, read)


def loaded(folder: Path) -> Kind:
    """The same, loaded whole."""
    kind = configs(folder)

    def read(drawn: tuple[str, bytes]) -> None:
        name, content = drawn
        (folder / name / "config.json").write_bytes(content)
        load_model(str(folder / name))

    return Kind("config.json, model loaded", kind.make, read, 1)


def weights(folder: Path) -> Kind:
    """Headers of safetensors files."""
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(0)}
    valid = [save(tensors, metadata={"format": "pt"}), save({"x": torch.arange(12).view(3, 4)}), save({})]
    file = _written(folder, "w.safetensors")
    return Kind(
        "safetensors headers",
        lambda random: other.other_safetensors(random, random.choice(valid)),
        lambda content: _ignored(tensor_names(file(content))),
    )


def indexes(folder: Path) -> Kind:
    """The index of a checkpoint in shards."""
    place = folder / "sharded"
    place.mkdir(exist_ok=True)
    shutil.copy(FIXTURES / "source" / "config.json", place)
    for name in ("one", "two"):
        (place / f"{name}.safetensors").write_bytes(save({f"{name}.weight": torch.ones(2)}))
    valid = json.dumps(
        {"metadata": {}, "weight_map": {"one.weight": "one.safetensors", "two.weight": "two.safetensors"}}
    )

    def read(content: bytes) -> None:
        (place / "model.safetensors.index.json").write_bytes(content)
        verify_checkpoint(place)

    return Kind("model.safetensors.index.json", lambda random: other.other_json(random, valid.encode()), read)


def texts(folder: Path) -> list[Kind]:
    """Text sources of every local kind, read, tokenized and cut."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    plain = "Return a list of the values.\nA function returns an object — or none.\n".encode() * 3
    rows = [{"text": f"row {i} of the text", "n": i, "tags": ["a", None]} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    tasks = [{"instruction": f"Say {i}", "input": "", "output": "a b c"} for i in range(3)]
    tasks.append({"instruction": "List", "instances": [{"input": "x", "output": "y z"}]})
    instructions = "".join(json.dumps(task) + "\n" for task in tasks).encode()
    ids = [save({"ids": torch.arange(48, dtype=kind).view(6, 8)}) for kind in (torch.int32, torch.int64, torch.uint8)]

    def reader(form: str, name: str, length: int | None = 8) -> Callable[[bytes], None]:
        file = _written(folder, name)

        def read(content: bytes) -> None:
            windows(parse_source(form.format(file(content))), tokenizer, _VOCABULARY, length)

        return read

    alpaca = _written(folder, "tasks.jsonl")

    def read_tasks(content: bytes) -> None:
        source = parse_source(f"alpaca:{alpaca(content)}")
        load_examples(source, tokenizer, _VOCABULARY, length=16)

    return [
        Kind("text", lambda random: other.other_bytes(random, plain), reader("text:{}", "t.txt")),
        Kind("jsonl", lambda random: other.other_lines(random, lines), reader("jsonl:{}#text", "t.jsonl")),
        Kind("alpaca", lambda random: other.other_lines(random, instructions), read_tasks),
        Kind(
            "tokens",
            lambda random: other.other_safetensors(random, random.choice(ids)),
            reader("tokens:{}", "t.safetensors", None),
        ),
        Kind("parquet", _parquet_maker(), reader("parquet:{}#text", "t.parquet"), 5),
    ]


def _parquet_maker() -> Callable[[Random], bytes]:
    """Parquet of text, lists, bytes, numbers, dates and nothing, whole and damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def file(column: Any, name: str = "text") -> bytes:
        out = io.BytesIO()
        pq.write_table(pa.table({name: column}), out)
        return out.getvalue()

    words = ["one two three four", "five six seven eight nine", None]
    valid = [
        file(pa.array(words)),
        file(pa.array(words, pa.large_string())),
        file(pa.array(words).dictionary_encode()),
        file(pa.array([["a"], ["b", "c"]])),
        file(pa.array([b"\xff\xfe", b"x"])),
        file(pa.array([1, 2, None])),
        file(pa.array([0.5, float("nan")])),
        file(pa.array([True])),
        file(pa.array([{"a": 1}])),
        file(pa.nulls(3)),
        file(pa.array([], pa.string())),
        file(pa.array([1], pa.date32())),
        file(pa.array(words), "other"),
    ]

    def make(random: Random) -> bytes:
        data = random.choice(valid)
        return data if random.random() < 0.2 else other.other_bytes(random, data)

    return make


def sources(_folder: Path) -> Kind:
    """The grammar of sources, and names that no file can have."""
    forms = ["text:", "jsonl:", "parquet:", "alpaca:", "tokens:", "hub:", "bundled:", "bundled", "txt:", ""]

    def make(random: Random) -> str:
        text = random.choice(forms) + "".join(
            random.choice([*other.WORDS, "#text"]) for _ in range(random.randrange(4))
        )
        return (
            text
            if random.random() < 0.7
            else other.other_bytes(random, text.encode()).decode("utf-8", "surrogateescape")
        )

    def read(text: str) -> None:
        source = parse_source(text)
        if source.kind in ("text", "jsonl", "parquet", "alpaca"):
            list(source.documents())
        elif source.kind == "tokens":
            source.token_ids()

    return Kind("names of sources", make, read, 5)


def all_kinds(folder: Path) -> list[Kind]:
    """Every kind, its files in a folder of its own."""
    made: list[Kind] = []
    one = (recipes, options, finetunings, plans, reports, configs, loaded, weights, indexes, sources)
    for each in one:
        place = folder / each.__name__
        place.mkdir(exist_ok=True)
        made.append(each(place))
    place = folder / "texts"
    place.mkdir(exist_ok=True)
    return made + texts(place)
