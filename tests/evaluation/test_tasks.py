"""Tasks: the harness's scores of the model in memory, made tasks, paired differences, and what is said of bad input."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import HARNESS_TASK, Run
from rankwise.checkpoints import load_model
from rankwise.data import parse_source
from rankwise.errors import DataError, NotFiniteError, RecipeError
from rankwise.evaluation import TaskScore, paired_difference, perplexity, run_tasks
from rankwise.evaluation.local_tasks import CHOICES, LOCAL_TASKS, make_examples, sentences_of
from rankwise.quickstart import MODEL

pytest.importorskip("lm_eval", reason="needs pip install '.[tasks]'")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model(str(MODEL))


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_made_tasks_are_sound_and_the_same_again(task: str) -> None:
    source = parse_source("bundled:heldout")
    examples = make_examples(task, source.documents(), str(source), count=40)
    assert examples == make_examples(task, source.documents(), str(source), count=40)
    assert examples != make_examples(task, source.documents(), str(source), count=40, seed=1)
    assert 20 <= len(examples) <= 40
    for example in examples:
        assert len(set(example["choices"])) == CHOICES
        assert 0 <= example["answer"] < CHOICES
        assert all(choice.startswith(" ") for choice in example["choices"])
    # The right one is not always in the same place.
    assert {example["answer"] for example in examples} == set(range(CHOICES))


def test_right_answers_are_right() -> None:
    for example in make_examples("local_arithmetic", [], "nothing", count=60):
        a, sign, b = example["context"].splitlines()[-1].removesuffix(" =").split()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert int(example["choices"][example["answer"]]) == right
    texts = list(parse_source("bundled:heldout").documents())
    runs = sentences_of(texts)
    joined = [" ".join(run) for run in runs]
    for task in ("local_next_sentence", "local_order"):
        for example in make_examples(task, texts, "bundled", count=20):
            whole = example["context"] + example["choices"][example["answer"]]
            assert any(whole in run for run in joined)


def test_a_text_without_sentences_is_said() -> None:
    with pytest.raises(DataError, match="no example for local_cloze"):
        make_examples("local_cloze", ["words without an end"], "text:a")


def test_the_harness_scores_what_the_model_finds_likely(loaded: Any, tmp_path: Path) -> None:
    """Accuracy by hand: which choice has the largest sum of log-probabilities."""
    text = parse_source("bundled:heldout")
    found = run_tasks(loaded.model, loaded.tokenizer, ["local_cloze"], limit=12, text=text)
    (acc,) = (score for score in found.scores if score.metric == "acc")
    by_hand = []
    for example in make_examples("local_cloze", text.documents(), str(text))[:12]:
        sums = []
        for choice in example["choices"]:
            context = loaded.tokenizer(example["context"])["input_ids"]
            whole = loaded.tokenizer(example["context"] + choice)["input_ids"]
            with torch.no_grad():
                logs = loaded.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        by_hand.append(float(max(range(CHOICES), key=sums.__getitem__) == example["answer"]))
    assert acc.by_example == tuple(by_hand)
    assert acc.score == pytest.approx(sum(by_hand) / 12)
    assert acc.error == pytest.approx(math.sqrt(acc.score * (1 - acc.score) / 11), rel=1e-6)
    assert acc.examples == 12
    assert acc.truncated == 0
    # Kept whole: what the harness says of itself is there too.
    assert {"configs", "versions", "n-samples", "samples"} <= set(found.harness["local_cloze"])


def test_perplexity_is_that_of_the_harness(loaded: Any) -> None:
    """Rolling log-likelihood of the harness and ours, on one text under equal windows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    window = 16
    text = next(parse_source("bundled:heldout").documents())
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][: 18 * window]
    text = loaded.tokenizer.decode(ids)
    assert loaded.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=window, batch_size=4)
    total = harness.loglikelihood_rolling(
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)], disable_tqdm=True
    )[0]
    stream = torch.tensor([harness.prefix_token_id, *ids])
    ours = perplexity(loaded.model, stream.view(window + 1, window + 1), stride=window)
    assert ours.tokens == len(ids)
    assert ours.perplexity == pytest.approx(math.exp(-total / len(ids)), rel=1e-3)


def test_what_is_longer_than_the_context_is_counted(tiny: Path) -> None:
    small = load_model(str(tiny))
    small.model.config.max_position_embeddings = 100
    found = run_tasks(small.model, small.tokenizer, ["local_next_sentence"], limit=8)
    examples = make_examples("local_next_sentence", parse_source("bundled:heldout").documents(), "bundled")[:8]
    lengths = [len(small.tokenizer(e["context"] + choice)["input_ids"]) for e in examples for choice in e["choices"]]
    assert found.scores[0].truncated == sum(length > 101 for length in lengths) > 0
    small.model.config.max_position_embeddings = 24
    with pytest.raises(DataError, match="more than the model's context of 24"):
        run_tasks(small.model, small.tokenizer, ["local_next_sentence"], limit=8)


def test_logits_that_are_not_finite_name_layer_and_token(tiny: Path) -> None:
    damaged = load_model(str(tiny))
    damaged.model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(NotFiniteError, match=r"task local_cloze: layer model\.layers\.1\.mlp\.up_proj, .* token 0"):
        run_tasks(damaged.model, damaged.tokenizer, ["local_cloze"], limit=2)
    with pytest.raises(NotFiniteError, match=r"windows 0 to 1: layer model\.layers\.1\.mlp\.up_proj"):
        perplexity(damaged.model, torch.arange(3, 35).view(2, 16))


@pytest.mark.long
def test_tasks_of_ones_own_run_and_unknown_ones_are_told_the_nearest(loaded: Any, tmp_path: Path) -> None:
    rows = [{"text": "Return a", "choices": [" list", " sea"], "answer": 0} for _ in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(HARNESS_TASK.format(data=tmp_path / "data.jsonl"))
    found = run_tasks(loaded.model, loaded.tokenizer, ["which_comes_next"], include=[tmp_path])
    assert [(score.score, score.examples) for score in found.scores] == [(1.0, 4)]
    for name, says in (("hellaswagg", "'hellaswag'"), ("local_close", "'local_cloze'"), ("0x", "without a network")):
        with pytest.raises(RecipeError, match=says):
            run_tasks(loaded.model, loaded.tokenizer, [name])
    with pytest.raises(RecipeError, match="no such folder"):
        run_tasks(loaded.model, loaded.tokenizer, ["local_cloze"], include=[tmp_path / "none"])


@pytest.mark.long
def test_a_task_whose_data_cannot_be_had_says_what_to_give(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"piqa cannot be run \(ConnectionError: no network here\)"):
        run_tasks(loaded.model, loaded.tokenizer, ["piqa"])


def _score(values: list[float]) -> TaskScore:
    return TaskScore("t", "acc", sum(values) / len(values), None, len(values), 0, tuple(values))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_the_error_of_a_paired_difference(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    found = paired_difference(_score(first), _score(second))
    apart = torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    assert found.difference == pytest.approx(float(apart.mean()), abs=1e-12)
    assert found.error == pytest.approx(float(apart.std() / math.sqrt(len(pairs))), abs=1e-12)
    # A model differs from itself by nothing, and that is certain.
    assert paired_difference(_score(first), _score(first)).error == 0.0


def test_a_figure_that_is_no_mean_has_no_paired_error() -> None:
    """A perplexity is given with the log-likelihoods of its examples."""
    first = TaskScore("lambada", "perplexity", math.exp(2.0), None, 2, 0, (-1.5, -2.5))
    second = TaskScore("lambada", "perplexity", math.exp(3.0), None, 2, 0, (-2.5, -3.5))
    assert paired_difference(first, second).error is None


def test_the_paired_error_is_smaller_than_that_of_independent_scores() -> None:
    draw = random.Random(0)
    first = [float(draw.random() < 0.5) for _ in range(400)]
    second = [1 - value if draw.random() < 0.05 else value for value in first]
    found = paired_difference(_score(first), _score(second))
    assert found.error is not None
    assert found.error < 0.5 * math.sqrt(2 * 0.25 / 400)


@pytest.mark.long
def test_evaluate_shows_scores_side_by_side(rankwise: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    status, out, error = rankwise(
        *("evaluate", tiny, "--tasks", "local_cloze", "--limit", "4", "--perplexity", f"text:{text},bundled:heldout"),
        *("--length", "32", "--sequences", "2", "--against", tiny, "--output", output, "--json"),
    )
    assert status == 0, error
    shown = json.loads(out)
    assert set(shown["perplexity"]) == {f"text:{text}", "bundled:heldout"}
    assert shown["perplexity"] == shown["against"]["perplexity"]
    assert [(row["difference"], row["error"]) for row in shown["differences"]] == [(0.0, 0.0), (0.0, 0.0)]
    kept = json.loads(output.read_text())
    assert [len(kept[i]["examples"]["local_cloze, acc"]) for i in (0, 1)] == [4, 4]
    assert "configs" in kept[0]["harness"]["local_cloze"]
    options = ("--text", "bundled:heldout", "--length", "32", "--sequences", "2", "--against", tiny, "--json")
    status, out, error = rankwise("evaluate", tiny, *options)
    assert status == 0, error
    assert json.loads(out)["against"]["perplexity"] == json.loads(out)["perplexity"]
    status, out, error = rankwise("evaluate", tiny, "--tasks", "local_cloze", "--limit", "4", "--against", tiny)
    assert status == 0, error
    assert "+0.0000 ± 0.0000" in out
    assert "Running" not in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "lokal"], "did you mean 'local'"),
        (["--limit", "4"], "no task"),
        (["--tasks", "local", "--precision", "flaot32"], "precision"),
        (["--tasks", "local", "--length", "32"], "no text"),
        (["--text", "bundled", "--output", "none/such/file.json"], "no such folder"),
        (["--text", "bundled", "--perplexity", "wikitext2"], "given twice"),
        (["--perplexity", "named:wikitext"], "did you mean 'wikitext2'"),
    ],
)
def test_evaluate_refuses(rankwise: Run, tiny: Path, options: list[str], says: str) -> None:
    status, _, error = rankwise("evaluate", tiny, *options)
    assert status == 2
    assert says in error


def test_models_that_cut_text_otherwise_are_not_compared(rankwise: Run, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(other)
    options = ("--perplexity", "bundled:heldout", "--sequences", "1", "--length", "32")
    status, _, error = rankwise("evaluate", tiny, *options, "--against", other)
    assert status == 2
    assert "different tokenizers" in error
