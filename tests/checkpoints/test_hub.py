"""Models, data sets and named texts from the hub: downloads for real, from a server on this machine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hub import Hub, serving
from rankwise import compress
from rankwise.data.named import NAMED_TEXTS
from rankwise.data.python_text import documents
from rankwise.recipes import recipe_from

pytestmark = pytest.mark.long

COMMANDS = """
import json, sys
from rankwise import cli

for words in json.loads(sys.argv[1]):
    sys.argv = ["rankwise", *words]
    try:
        cli.main()
    except SystemExit as stopped:
        print("status", stopped.code or 0, flush=True)
"""
"""Every command in one process, as importing takes longer than most of them."""

PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["rankwise"] = None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Return the", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0]), type(model).__name__)
"""


@dataclass(frozen=True)
class Served:
    """A hub, and programs that know no other.

    Attributes:
        hub: what is served.
        home: where programs keep what they download.
    """

    hub: Hub
    home: Path

    def python(self, program: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a program that downloads from here."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.hub.address,
            "HF_HOME": str(self.home),
            "TERM": "dumb",
            "COLUMNS": "200",
            **settings,
        }
        return subprocess.run(
            [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, cwd=self.home
        )

    def commands(self, *commands: str, **settings: str) -> tuple[list[int], str, str]:
        """Run command lines of rankwise: their statuses, and all output."""
        done = self.python(COMMANDS, json.dumps([command.split() for command in commands]), **settings)
        lines = done.stdout.splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("status ")], done.stdout, done.stderr


def put_texts(root: Path) -> None:
    """A data set of JSON lines, and the three texts with names, short."""
    rows = list(documents("heldout"))[:40]
    own = root / "datasets" / "someone" / "texts" / "train.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for text in NAMED_TEXTS.values():
        file = root.joinpath("datasets", *text.repository.split("/"), *text.file.split("/"))
        file.parent.mkdir(parents=True)
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress("\n".join(json.dumps({text.field: row}) for row in rows).encode()))
        else:
            pyarrow.parquet.write_table(pyarrow.table({text.field: rows}), file)


def put_task(root: Path) -> None:
    """The data of `arc_easy`, in the form that lm-evaluation-harness asks for."""
    folder = root / "datasets" / "allenai" / "ai2_arc"
    rows = [
        {
            "id": str(number),
            "question": f"What is {number} and one?",
            "choices": {"text": [str(number + 1), "none", "0", "7"], "label": list("ABCD")},
            "answerKey": "A",
        }
        for number in range(8)
    ]
    (folder / "ARC-Easy").mkdir(parents=True)
    card = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:"]
    for split in ("train", "validation", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "ARC-Easy" / f"{split}-0.parquet")
        card += [f"  - split: {split}", f"    path: ARC-Easy/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


@pytest.fixture(scope="module")
def served(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    shutil.copytree(bundled, root / "models" / "someone" / "model")
    values: dict[str, Any] = {
        "model": str(bundled),
        "output": str(root / "models" / "someone" / "small"),
        "budget": {"keep": 0.8},
        "calibration": {"source": "bundled:train", "sequences": 8, "length": 64},
    }
    compress(recipe_from(values), run_directory=tmp_path_factory.mktemp("run"))
    put_texts(root)
    put_task(root)
    with serving(root) as hub:
        yield Served(hub, home)


@pytest.mark.parametrize("memory", ["whole", "blocks"])
def test_a_model_is_compressed_by_its_name_with_text_from_the_hub(memory: str, served: Served) -> None:
    text = "--calibration hub:someone/texts#text --sequences 8 --length 64"
    command = f"compress someone/model -o {memory} --keep 0.8 --memory {memory} {text} --evaluation named:wikitext2"
    statuses, _, said = served.commands(command)
    assert statuses == [0], said
    report = json.loads((served.home / memory / "rankwise_report.json").read_text())
    assert report["recipe"]["model"] == "someone/model"
    assert report["evaluation"]["compressed"]["perplexity"] > report["evaluation"]["dense"]["perplexity"]
    assert "base_model: someone/model" in (served.home / memory / "README.md").read_text()


def test_texts_with_names_are_read_at_the_revisions_written_down(served: Served) -> None:
    statuses, out, said = served.commands("evaluate someone/model --perplexity wikitext2,ptb,c4")
    assert statuses == [0], said
    # A table with a line for each text.
    scores = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith(tuple(NAMED_TEXTS))}
    assert scores.keys() == NAMED_TEXTS.keys()
    assert all(float(score.replace(",", "")) > 1 for score in scores.values())
    for text in NAMED_TEXTS.values():
        revision = text.revision.replace("/", "%2F")
        assert f"/datasets/{text.repository}/resolve/{revision}/{text.file}" in served.hub.asked


def test_tasks_are_had_from_the_hub_and_those_that_cannot_be_are_said(served: Served) -> None:
    statuses, out, said = served.commands(
        "evaluate someone/model --tasks arc_easy --limit 4", "evaluate someone/model --tasks piqa --limit 4"
    )
    assert statuses == [0, 2], said
    (line,) = [line for line in out.splitlines() if line.startswith("arc_easy, acc ")]
    assert line.split("│")[1].split() == ["4"]
    assert "piqa" in said
    assert "Traceback" not in said


def test_a_compressed_model_is_used_by_its_name(served: Served) -> None:
    statuses, _, said = served.commands(
        "cost someone/small",
        "evaluate someone/small --perplexity wikitext2",
        "generate someone/small --prompt Return",
        "compress someone/small -o again --keep 0.5",
    )
    assert statuses == [0, 0, 0, 2], said
    assert "compressed already" in said
    # None of its code was run: the package has the same.
    assert not list((served.home / "modules").rglob("modeling_rankwise.py"))
    plain = served.python(PLAIN, "someone/small")
    assert plain.returncode == 0, plain.stderr
    assert "Return the" in plain.stdout
    assert list((served.home / "modules").rglob("modeling_rankwise.py"))


def test_what_was_not_downloaded_whole_is_said_and_mended(served: Served) -> None:
    folder = served.hub.root / "models" / "someone" / "later"
    shutil.copytree(served.hub.root / "models" / "someone" / "small", folder)
    # Of a cost the config is enough; then the network is gone.
    statuses, _, said = served.commands("cost someone/later")
    assert statuses == [0], said
    score = "evaluate someone/later --perplexity bundled:heldout"
    statuses, _, said = served.commands(score, HF_HUB_OFFLINE="1")
    assert statuses == [2]
    assert "downloaded of the checkpoint is not whole" in said
    assert "someone/later" in said
    assert served.commands(score)[0] == [0]
    assert served.commands(score, HF_HUB_OFFLINE="1")[0] == [0]


def test_what_is_not_there_is_said(served: Served) -> None:
    statuses, _, said = served.commands(
        "compress someone/nothing -o none --keep 0.8",
        "compress someone/model -o none --keep 0.8 --calibration hub:someone/nothing#text",
        "compress someone/model -o none --keep 0.8 --calibration hub:someone/texts#body",
    )
    assert statuses == [2, 2, 2]
    assert "Traceback" not in said
    assert all(words in said for words in ("someone/nothing", "hub:someone/nothing#text", "its fields: text"))


def test_a_damaged_download_is_noticed(served: Served) -> None:
    folder = served.hub.root / "models" / "someone" / "damaged"
    shutil.copytree(served.hub.root / "models" / "someone" / "small", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    statuses, _, said = served.commands("evaluate someone/damaged --perplexity wikitext2")
    assert statuses == [2]
    assert "model.safetensors" in said
    assert "Traceback" not in said
