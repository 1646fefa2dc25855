"""A short decode is timed: bounded, and one token a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run, tiny_llama
from rankwise.evaluation import decode_speed, measure_speeds


@pytest.mark.parametrize(("seconds", "context", "steps"), [(60.0, 64, 4), (0.0, 64, 1), (60.0, 20, 4)])
def test_a_decode_is_bounded(seconds: float, context: int, steps: int) -> None:
    model, seen = tiny_llama(max_position_embeddings=context), []

    def watch(_module: Any, _inputs: Any, given: dict[str, Any], out: Any) -> None:
        seen.append((given["input_ids"].shape[1], out.past_key_values.get_seq_length()))

    model.register_forward_hook(watch, with_kwargs=True)
    assert decode_speed(model, torch.arange(3, 60), seconds=seconds, tokens=4) > 0
    # The prompt, and a step that is not timed.
    prompt = min(16, context - 6)
    assert seen == [(prompt, prompt), *((1, prompt + each + 1) for each in range(steps + 1))]
    assert seen[-1][1] <= context


def test_models_take_turns_and_the_first_round_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of each model goes at its own rate here, so that what is measured of which is known."""
    models = {"slow": tiny_llama(), "fast": tiny_llama()}
    order: list[str] = []
    now = [0.0]
    for name, model in models.items():

        def tick(_module: Any, _inputs: Any, given: dict[str, Any], _out: Any, name: str = name) -> None:
            order.append(name)
            step = given["input_ids"].shape[1] == 1
            first_round = order.count(name) <= 4
            now[0] += (0.5 if step else 2.0) * (1 if name == "slow" else 0.1) * (100 if first_round else 1)

        model.register_forward_hook(tick, with_kwargs=True)
    monkeypatch.setattr("rankwise.evaluation.speed.time.perf_counter", lambda: now[0])
    found = measure_speeds(models, torch.arange(3, 13), tokens=3, rounds=2)
    assert order == (["slow"] * 4 + ["fast"] * 4) * 3
    for name, rate in (("slow", 1.0), ("fast", 0.1)):
        each = found[name]
        assert each.prefill.middle == pytest.approx(10 / (2.0 * rate))
        assert each.first_token.most == pytest.approx(2.0 * rate)
        assert each.decode.least == each.decode.most == pytest.approx(1 / (0.5 * rate))


def test_the_command_shows_speed_beside_cost(rankwise: Run, tiny: Path) -> None:
    options = ("--prompt", "8", "--tokens", "2", "--rounds", "1")
    status, out, error = rankwise("speed", tiny, *options, "--json")
    assert status == 0, error
    (found,) = json.loads(out).values()
    assert found["decode"]["middle"] > 0
    assert found["cost"]["parameters"] > 0
    status, out, _ = rankwise("speed", tiny, "--against", tiny, *options)
    assert status == 0
    assert "took turns" in out
    assert "(again)" in out
    assert "ratio" in out
    status, _, error = rankwise("speed", tiny, "--prompt", "100000")
    assert status == 2
    assert "beyond the model's context" in error
