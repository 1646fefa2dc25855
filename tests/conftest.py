"""Fixtures: a tiny random Llama with a real tokenizer, the bundled model, and the real models where they are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rankwise import cli
from rankwise.allocation import Problem
from rankwise.methods import method_named
from rankwise.models import Head, Logits, Site
from rankwise.quickstart import MODEL
from rankwise.sizes import Allowance, Budget

Run = Callable[..., tuple[int, str, str]]

# How long an example takes says how busy the machine is.
hypothesis_settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


IDS = list(range(3, 27))

HARNESS_TASK = """
task: which_comes_next
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
"""A task of lm-evaluation-harness over a file, to be formatted with its `data`."""

LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
"""The shapes of the paper's tables."""

ELSEWHERE = """
import functools, sys
sys.modules["rankwise"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again, logits = sys.argv[1:]
expected = torch.load(logits, weights_only=True)
ids = torch.arange(3, 27)[None]
if hasattr(AutoConfig.from_pretrained(folder, trust_remote_code=True), "rankwise_cache_dense"):
    # The logits to compare with were computed from codes.
    load = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = functools.partial(load, rankwise_cache_dense=False)
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, expected), "logits differ"
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype="auto")
with torch.no_grad():
    assert torch.equal(reloaded(input_ids=ids).logits, expected), "logits differ after a round trip"
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "Rankwise" in type(base).__name__
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
built = AutoModel.from_config(config, trust_remote_code=True)  # the way serving engines build it
assert [n for n, _ in built.named_parameters()] == [n for n, _ in base.named_parameters()]
for kind in (AutoModelForCausalLM, AutoModel):
    try:
        kind.from_pretrained(folder, trust_remote_code=False)
    except ValueError as problem:
        assert "trust_remote_code" in str(problem)
    else:
        raise AssertionError("loaded without trust")
assert not any(name == "rankwise" or name.startswith("rankwise.") for name, m in sys.modules.items() if m)
print("fine")
"""
"""Loads a checkpoint in a process that cannot import rankwise and compares its logits."""

KILLED = """
import os, signal, sys
import yaml
from rankwise import compress
from rankwise.stages import jobs, measuring, planning
from rankwise.recipes import recipe_from
from rankwise.checkpoints import save
where, after, recipe, run_directory = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
owner = next(each for each in (save, measuring, jobs, planning) if hasattr(each, where))
real, calls = getattr(owner, where), []
def dying(*arguments, **options):
    calls.append(1)
    if len(calls) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, where, dying)
compress(recipe_from(yaml.safe_load(open(recipe))), run_directory=run_directory)
"""
"""Runs a recipe in a process that kills itself at the n-th call of a function."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("RANKWISE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"real models are not at {folder}; set RANKWISE_SHARED")
    return folder


@pytest.fixture(scope="session")
def bundled() -> Path:
    return MODEL


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention; weights large enough that its outputs differ."""
    settings: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


class _Given(Head):
    """A head for logits that are there already."""

    def __init__(self, vocabulary: int) -> None:
        self._decoder, self.vocabulary = None, vocabulary


def given_logits(values: torch.Tensor) -> Logits:
    """Logits that are there already, as those of a model are made."""
    return Logits(_Given(values.shape[-1]), values)


def make_site(name: str, m: int, n: int, role: str = "q") -> Site:
    return Site(name, role, 0, m, n, False, False, name)


def make_problem(sites: list[Site], method: str = "svd", number_bits: int = 16, **budget: Any) -> Problem:
    """What an allocation chooses from, for a method with its default settings."""
    asked = Budget(**{"storage": "two_factor", **budget})
    kind = method_named(method)
    form = kind.form(asked, number_bits)
    candidates = {s.name: kind.candidates((s.m, s.n), form, asked.rank_multiple, False) for s in sites}
    return Problem(sites, candidates, form, Allowance(asked, sum(s.parameters for s in sites), number_bits))


def failed(result: tuple[int, str, str], *says: str) -> None:
    """Assert that a command ended with an error for people, which says this."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    for each in ("error: ", *says):
        assert each in err


@pytest.fixture(scope="session")
def _tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(_tiny_source: Path, tmp_path: Path) -> Path:
    """A directory with a tiny model, free to be damaged."""
    return Path(shutil.copytree(_tiny_source, tmp_path / "tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = ["list", "object", "return", "the", "string", "value", "of", "a", "function", "class"]
    lines = (" ".join(words[(i * j + j) % len(words)] for j in range(1, 12)) + "\n" for i in range(400))
    path.write_text("".join(lines))
    return path


@pytest.fixture
def settings(tiny: Path, text: Path) -> Callable[..., dict[str, Any]]:
    """A recipe's mapping for the tiny model, with changes on top."""

    def make(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model": str(tiny),
            "method": "bolaco",
            "budget": {"keep": 0.6, "rank_multiple": 1},
            "calibration": {"source": f"text:{text}", "sequences": 40, "length": 32},
        }
        return {**base, **changes}

    return make


@pytest.fixture
def rankwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit status, standard output, standard error."""

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@cache
def results(name: str) -> Any:
    """The figures of `benchmarks/results/NAME.json`."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"]


def figures(name: str, figure: str, part: str = "", **has: Any) -> list[float]:
    """A figure in all records of a results file that have what is asked for.

    Args:
        name: of the results file.
        figure: key in a record, or keys joined by slashes.
        part: where in the file the records are.
        has: keys and values.
    """
    found = []
    for record in results(name)[part] if part else results(name):
        if all(record[key] == value for key, value in has.items()):
            value = record
            for key in figure.split("/"):
                value = value.get(key, {})
            found += [] if value == {} else [float(value)]
    return found
