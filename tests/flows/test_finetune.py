"""`rankwise finetune`: every method end to end, checkpoints that stand alone, and what is said about bad input."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ELSEWHERE, IDS, failed, tiny_llama
from rankwise import cli, compress, repair
from rankwise.checkpoints import REPORT_FILE, load_model, reserved
from rankwise.data import load_examples, parse_source
from rankwise.data.instructions import IGNORED, prompt_of, read_instructions
from rankwise.errors import DataError, RunError
from rankwise.flows.finetune import finetune as finetune_flow
from rankwise.progress import Reporter
from rankwise.recipes import FineTune, recipe_from
from rankwise.reports import Report
from rankwise.sizes import Cut, Plan
from rankwise.stages import tuning
from rankwise.stages.begun import begin_training, same_settings, training_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [
        {
            "instruction": f"return the {word}",
            "input": "a list" if i % 2 else "",
            "output": f"the {word} of a list " * 2,
        }
        for i, word in enumerate(["object", "string", "value", "function", "class"] * 5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def compressed(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    budget = {"keep": 0.6, "rank_multiple": 1, "storage": "pivoted"}
    compress(recipe_from(settings(output=str(tmp_path / "small"), method="two_sided", budget=budget)))
    return tmp_path / "small"


@pytest.fixture
def finetune(
    compressed: Path, instructions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run the command in this process: exit status, standard output, standard error. Later options override."""

    def run(*words: Any, model: Any = compressed, data: Any = f"alpaca:{instructions}") -> tuple[int, str, str]:
        output = compressed.with_name("tuned")
        base = ["--data", data, "-o", output, "--length", 32, "--epochs", 1, "--held-out", 5]
        monkeypatch.setattr(sys, "argv", ["rankwise", "finetune", *map(str, [model, *base, *words])])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


METHODS = [
    ("full-factors", "--lr", 0.001, "--loss", "kl"),
    ("full-factors", "--lr", 0.001, "--set", "norms=true", "--loss", "lm"),
    ("subspace", "--batch-size", 4),
    ("lora", "--merge", "grow", "--set", "rank=2", "--batch-size", 4),
    ("lora", "--merge", "truncate", "--set", "rank=2", "--batch-size", 4),
]


@pytest.mark.long
@pytest.mark.parametrize("words", METHODS, ids=lambda words: "-".join(map(str, words)))
def test_every_method_gives_a_checkpoint_that_stands_alone(
    words: tuple[Any, ...], finetune: Run, compressed: Path, tmp_path: Path
) -> None:
    status, out, err = finetune("--method", *words, "--json")
    assert status == 0, err
    report = json.loads(out)
    facts = report["finetune"][-1]
    assert facts["examples"]["count"] == 20
    assert facts["trained_parameters"] > 0
    assert all(row["loss"] > 0 for row in facts["history"])
    before, after = (Plan.load(compressed.with_name(name) / "plan.json") for name in ("small", "tuned"))
    if "grow" in words and facts["accepted"]:
        # Pivoted, every rank below the full one takes less than the dense weight: r (m + n - r) < m n.
        most = {name: min(shape) - 1 for name, shape in before.shapes.items()}
        grown = {
            name: Cut(max(cut.rank, min(cut.rank + 2, most[name])))
            for name, cut in before.cuts.items()
            if cut.rank is not None
        }
        assert {name: after.cuts[name] for name in grown} == grown
        assert report["keep"]["got"] == after.kept > before.kept
        assert "the model has grown" in err
        assert "raise ranks" in err
    else:
        assert after.cuts == before.cuts
        assert report["after"]["linear_parameters"] == facts["cost_before"]["linear_parameters"]
    tuned = compressed.with_name("tuned")
    logits = load_model(str(tuned)).model(input_ids=torch.tensor([IDS])).logits.detach()
    torch.save(logits, tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tuned), str(tmp_path / "again"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert not tuned.with_name(".tuned.training").exists()
    assert f"- fine-tuned with `{words[0]}` on 20 examples" in (tuned / "README.md").read_text()


def test_a_tuned_checkpoint_can_be_tuned_again(finetune: Run, compressed: Path, text: Path) -> None:
    words = ("--method", "full-factors", "--lr", 0.001, "--evaluation", f"text:{text}")
    status, out, _ = finetune(*words, data=f"text:{text}")
    assert status == 0
    assert "perplexity: " in out
    second = ("--output", compressed.with_name("twice"), "--method", "full-factors", "--lr", 0.001, "--json")
    status, out, err = finetune(*second, model=compressed.with_name("tuned"), data=f"text:{text}")
    assert status == 0, err
    assert len(json.loads(out)["finetune"]) == 2


def test_a_diverging_training_is_rolled_back_and_said(
    finetune: Run, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = iter([1.0, 1.5])
    monkeypatch.setattr(tuning, "mean_loss", lambda *_: next(rising))
    status, _, err = finetune("--method", "full-factors", "--set", "norms=true", "--lr", 0.5)
    assert status == 0
    assert "the training was undone" in err
    assert "from 1 to 1.5" in err
    ids = torch.tensor([IDS])
    one, other = (load_model(str(compressed.with_name(name))).model for name in ("small", "tuned"))
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_killed_training_is_refused_with_other_settings_and_goes_on_with_the_same(
    finetune: Run, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--method", "full-factors", "--batch-size", 4, "--epochs", 2, "--set", "save_every=2", "--lr", 0.001)
    status, _, _ = finetune(*words)
    assert status == 0
    expected = load_model(str(compressed.with_name("tuned"))).model
    shutil.rmtree(compressed.with_name("tuned"))
    whole = tuning.train

    def killed(*arguments: Any, **named: Any) -> Any:
        def told(step: int, steps: int, loss: float) -> None:
            if step == 5:
                raise KeyboardInterrupt

        return whole(*arguments, **{**named, "step_done": told})

    monkeypatch.setattr(tuning, "train", killed)
    status, _, err = finetune(*words)
    folder = compressed.with_name(".tuned.training")
    assert status == 130
    assert f"the training is kept up to step 4 in {folder}" in err
    monkeypatch.setattr(tuning, "train", whole)
    assert list(folder.glob("checkpoint-*"))
    failed(finetune(*words, "--lr", 0.002), "begun with other settings: lr.", "--restart")
    weights = compressed / "model.safetensors"
    whole_weights = weights.read_bytes()
    save_file(
        {n: 2 * t if t.is_floating_point() else t for n, t in load_file(weights).items()}, weights, {"format": "pt"}
    )
    failed(finetune(*words), "begun with other settings: weights of the model.")
    weights.write_bytes(whole_weights)
    status, _, err = finetune(*words)
    assert status == 0, err
    found = load_model(str(compressed.with_name("tuned"))).model
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)


def test_one_process_trains_for_an_output(finetune: Run, compressed: Path) -> None:
    folder = compressed.with_name(".tuned.training")
    with reserved(compressed.with_name("tuned")):
        failed(finetune(), "Another run is writing this output", "another --output")
    failed(finetune("--held-out", 400), "held out")
    assert not folder.exists()


def test_a_training_whose_settings_are_damaged_begins_anew(tmp_path: Path) -> None:
    reporter = Reporter(show=False)
    with training_folder(tmp_path / "tuned", reporter) as folder:
        begin_training(folder, {"lr": 0.1})
        (folder / "checkpoint-4").mkdir()
        same_settings(folder, {"lr": 0.1}, False, reporter)
        assert (folder / "checkpoint-4").exists()
        with pytest.raises(RunError, match="other settings: lr"):
            same_settings(folder, {"lr": 0.2}, False, reporter)
        settings = folder / "begun" / "settings.json"
        settings.write_text(settings.read_text().replace("0.1", "0.2"))
        same_settings(folder, {"lr": 0.2}, False, reporter)
        assert "was damaged (settings.json has other contents than were written): it begins anew" in reporter.notes[0]
        assert not (folder / "checkpoint-4").exists()
    assert not folder.exists()
    full = pytest.raises(RunError, match="disk is full: nothing was trained yet")
    with full, training_folder(tmp_path / "tuned", reporter):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_tuned(finetune: Run, compressed: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    failed(finetune(model=tiny), "no directory that rankwise compress wrote")
    failed(finetune(model=tmp_path / "nowhere"), "no directory that rankwise compress wrote")
    failed(finetune("--method", "loraa"), "no method 'loraa'", "lora")
    failed(finetune("--method", "lora", "--set", "rnk=3"), "no setting 'rnk'", "rank")
    failed(finetune("--lr", -1), "lr")
    failed(finetune("--held-out", 400), "held out", "400")
    failed(finetune(data=f"text:{text}.gone"), "gone")
    failed(finetune("--output-only", data=f"text:{text}"), "no outputs")
    failed(finetune("--loss", "kl", "--original", tmp_path / "nowhere"), "needs the original", "--original")
    failed(finetune("--evaluation", text), "evaluation: ")
    tiny_llama(vocab_size=1000).save_pretrained(tmp_path / "other")
    failed(finetune("--loss", "kl", "--original", tmp_path / "other"), "predicts 1000 tokens")
    report = json.loads((compressed / REPORT_FILE).read_text())
    whole_plan = json.loads((compressed / "plan.json").read_text())
    shapes = {**whole_plan["shapes"], "model.layers.1.mlp.up_proj": [88, 32]}
    (compressed / "plan.json").write_text(json.dumps({**whole_plan, "shapes": shapes}))
    failed(finetune(), "of other sites: model.layers.1.mlp.up_proj differs", "written together")
    dense = {name: {"rank": None} for name in report["sites"]}
    (compressed / "plan.json").write_text(json.dumps({**whole_plan, "cuts": dense}))
    failed(finetune(), "not those of its plan")
    (compressed / REPORT_FILE).write_text(json.dumps({"format": "rankwise-report/1", "recipe": report["recipe"]}))
    failed(finetune(), "The report lacks 'model_fingerprint'", str(compressed / REPORT_FILE))


BAD_LINES = [
    ("nonsense", "not JSON"),
    ("[1]", "no JSON object"),
    ('{"instruction": "a"}', "no text field 'output'"),
    ('{"output": "a", "instruction": 3}', "no text field 'instruction'"),
    ('{"instruction": "a", "output": "b", "input": null}', "no text field 'input'"),
    ('{"instruction": "a", "instances": "b"}', "no list of objects"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_the_first_bad_line_is_named(line: str, message: str, finetune: Run, instructions: Path) -> None:
    lines = instructions.read_text().splitlines()
    instructions.write_text("\n".join([*lines[:3], line, *lines[3:], "also bad"]))
    failed(finetune(), message, f"{instructions}, line 4")


def test_a_line_in_another_encoding_is_named(finetune: Run, instructions: Path) -> None:
    instructions.write_bytes('{"instruction": "café", "output": "a"}'.encode("latin-1") + b"\n")
    failed(finetune(), "not JSON", "line 1")


def test_examples_longer_than_the_length_are_cut_and_counted(finetune: Run, instructions: Path) -> None:
    long = {"instruction": "return the object", "output": "a list of a string " * 40}
    instructions.write_text(json.dumps(long) + "\n" + instructions.read_text())
    status, _, err = finetune("--length", 500, "--method", "subspace")
    assert status == 0
    assert "cut to the context of 64 tokens, not 500" in err
    assert "1 of 26 examples were longer than 64 tokens: cut" in err


def test_the_prompt_and_the_seed_tasks_form(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "seed.jsonl"
    instances = [{"input": "x", "output": "one"}, {"input": "", "output": "two"}]
    file.write_text(json.dumps({"id": "a", "instruction": "do", "instances": instances}) + "\n\n")
    records = list(read_instructions(file))
    assert [record["output"] for record in records] == ["one", "two"]
    assert prompt_of(records[0]) == "### Instruction:\ndo\n\n### Input:\nx\n\n### Response:\n"
    assert prompt_of(records[1]) == "### Instruction:\ndo\n\n### Response:\n"
    loaded = load_model(str(tiny))
    source = parse_source(f"alpaca:{file}")
    for only in (False, True):
        found = load_examples(source, loaded.tokenizer, loaded.vocabulary, length=64, output_only=only)
        for record, ids, labels in zip(records, found.ids, found.labels, strict=True):
            learned = labels != IGNORED
            assert torch.equal(ids[learned], labels[learned])
            assert loaded.tokenizer.decode(ids[:-1]) == prompt_of(record) + record["output"]
            expected = record["output"] if only else prompt_of(record) + record["output"]
            assert loaded.tokenizer.decode(ids[learned][:-1]) == expected
    with pytest.raises(DataError, match="no example"):
        load_examples(source, loaded.tokenizer, loaded.vocabulary, length=2, output_only=True)


def test_the_flow_is_there_for_python_too(compressed: Path, instructions: Path, tmp_path: Path) -> None:
    wanted = FineTune(
        model=str(compressed), data=f"alpaca:{instructions}", output=str(tmp_path / "mine"), length=32, held_out=5
    )
    report = finetune_flow(wanted)
    assert report.finetune[0].settings.method == "full-factors"
    assert report.finetune[0].settings.settings["epochs"] == 4
    assert Report.load(tmp_path / "mine" / REPORT_FILE).finetune == report.finetune
    assert type(wanted.model_copy(update={"method": "lora"}).training).__name__ == "Lora"
    with pytest.raises(ValueError, match="not those of lora"):
        FineTune(**{**wanted.model_dump(), "method": "lora", "settings": repair.Subspace()})
