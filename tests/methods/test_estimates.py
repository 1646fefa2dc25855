"""Losses of codes that are estimated without codes, beside those of making all codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise import compress
from rankwise.errors import RankwiseError
from rankwise.methods.quantize import Quantize
from rankwise.recipes import recipe_from
from rankwise.stages import crews
from rankwise.statistics.input_moments import InputMoments
from rankwise.statistics.moment_sums import MomentTotals

CHOICES = (2, 3, 4)


class Seen:
    """Statistics of inputs and gradients that are correlated, some far larger than others."""

    def __init__(self, m: int, n: int, source: torch.Generator) -> None:
        def moment(size: int) -> Tensor:
            spread = torch.linspace(0, 4, size).exp() * torch.randn(2 * size, size, generator=source)
            mixed = spread @ torch.randn(size, size, generator=source)
            return (mixed.T @ mixed / len(mixed)).double()

        self.bias = None
        self._inputs = MomentTotals(2, torch.zeros(n, dtype=torch.float64), 2 * moment(n))
        self._curvature = moment(m)[None]

    def of(self, statistic: Any) -> Any:
        return self._inputs if isinstance(statistic, InputMoments) else self._curvature


@pytest.mark.parametrize("shape", [(64, 96), (256, 96), (192, 320), (128, 100)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"output_feedback": False},
        {"output_damping": 1.0},
        {"codebook": "uniform"},
        {"row_scales": False},
        {"feedback": False},
        {"group": 32},
    ],
    ids=str,
)
def test_estimates_are_near_what_codes_lose(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    source = torch.Generator().manual_seed(sum(shape))
    seen: Any = Seen(*shape, source)
    weight = torch.randn(shape, generator=source).double() * torch.linspace(0.1, 3, shape[0])[:, None]
    method = Quantize(**settings)
    found = method.estimates(weight, seen, CHOICES, torch.Generator().manual_seed(1))
    assert list(found) == list(CHOICES)
    for bits in CHOICES:
        made = float(method.outlook(weight, seen, bits, torch.Generator().manual_seed(1)).basis.energy.sum())
        assert found[bits] == pytest.approx(made, rel=0.25), bits
    assert found[2] > 2 * found[3] > 4 * found[4]


@pytest.mark.parametrize("codebook", ["uniform", "nf"])
@pytest.mark.parametrize("shape", [(64, 100), (96, 9), (128, 256)], ids=str)
def test_estimates_of_more_bits_are_near_too(codebook: str, shape: tuple[int, int]) -> None:
    source = torch.Generator().manual_seed(sum(shape))
    seen: Any = Seen(*shape, source)
    weight = torch.randn(shape, generator=source).double()
    method, choices = Quantize(codebook=codebook), tuple(range(2, 9))
    found = method.estimates(weight, seen, choices, torch.Generator().manual_seed(1))
    for bits in choices:
        made = float(method.outlook(weight, seen, bits, torch.Generator().manual_seed(1)).basis.energy.sum())
        assert made / 2 < found[bits] < 2 * made, bits


def test_inputs_that_almost_determine_one_another_give_no_losses_beyond_reason() -> None:
    """Feedback makes targets many times larger than the scales were fitted to."""
    source = torch.Generator().manual_seed(0)
    seen: Any = Seen(64, 256, source)
    x = torch.randn(16, 256, generator=source).double()
    seen._inputs = MomentTotals(16, torch.zeros(256).double(), x.T @ x)
    weight = torch.randn(64, 256, generator=source).double()
    method = Quantize(damping=1e-6)
    found = method.estimates(weight, seen, CHOICES, torch.Generator().manual_seed(1))
    for bits in CHOICES:
        made = float(method.outlook(weight, seen, bits, torch.Generator().manual_seed(1)).basis.energy.sum())
        assert made / 3 < found[bits] < 3 * made, bits


@pytest.mark.parametrize("feedback", [True, False])
def test_a_site_that_no_text_reaches_is_not_estimated(feedback: bool) -> None:
    source = torch.Generator().manual_seed(0)
    seen: Any = Seen(64, 96, source)
    seen._inputs = MomentTotals(2, torch.zeros(96).double(), torch.zeros(96, 96).double())
    weight = torch.randn(64, 96, generator=source).double()
    assert not Quantize(feedback=feedback).estimates(weight, seen, CHOICES, source)


def test_what_rounding_takes_off_a_weight_as_a_whole_is_counted() -> None:
    """Rounded to the nearest, all rows shrink alike, and what the outputs heed most shrinks with them."""
    source = torch.Generator().manual_seed(0)
    seen: Any = Seen(128, 96, source)
    outputs = torch.linalg.eigh(seen.of("curvature")[0])[1][:, -1]
    inputs = torch.linalg.eigh(seen.of(InputMoments()).second_moment())[1][:, -1]
    weight = torch.randn(128, 96, generator=source).double() + 30 * torch.outer(outputs, inputs)
    method = Quantize(feedback=False)
    found = method.estimates(weight, seen, CHOICES, torch.Generator().manual_seed(1))
    for bits in CHOICES:
        made = float(method.outlook(weight, seen, bits, torch.Generator().manual_seed(1)).basis.energy.sum())
        assert found[bits] == pytest.approx(made, rel=0.2), bits


@pytest.mark.parametrize(
    ("rows", "choices", "settings", "scale"),
    [
        (128, (3,), {}, 1.0),
        (128, CHOICES, {"passes": 1}, 1.0),
        (128, CHOICES, {"hadamard": False}, 1.0),
        (128, CHOICES, {}, 0.0),
    ],
    ids=["no choice", "passes", "rows are not alike", "a weight of zeros"],
)
def test_nothing_is_estimated_where_it_saves_or_says_nothing(
    rows: int, choices: tuple[int, ...], settings: dict[str, Any], scale: float
) -> None:
    source = torch.Generator().manual_seed(0)
    seen: Any = Seen(rows, 64, source)
    weight = scale * torch.randn(rows, 64, generator=source).double()
    assert not Quantize(**settings).estimates(weight, seen, choices, source)


def test_codes_are_made_for_what_the_plan_chose_alone(settings: Callable[..., dict[str, Any]]) -> None:
    values = settings(method="quantize", budget={"bits": 3.5, "rank_multiple": 1})
    result = compress(recipe_from(values))
    run = Path(result.report.run_directory)
    seen = next(run.glob("outlooks-quantize-*"))
    fits = next(run.glob("fits-quantize-*"))
    assert result.plan.shapes
    for name in result.plan.shapes:
        assert [path.name for path in seen.glob(f"{name}.*")] == [f"{name}.losses.json"]
        assert len(list(fits.glob(f"{name}.*.safetensors"))) == 1


@pytest.mark.parametrize("method", ["quantize", "caldera"])
def test_codes_are_the_same_however_many_sites_are_rounded_at_once(
    method: str, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []
    for at_once in (1, 3):
        monkeypatch.setattr(crews, "rounded_at_once", lambda *_, at_once=at_once: at_once)
        values = settings(method={"name": method, "rank": 4} if method == "caldera" else method, budget={"bits": 3.5})
        output = tmp_path / f"{at_once}"
        compress(recipe_from({**values, "output": str(output)}), run_directory=tmp_path / f"run-{at_once}")
        made.append((output / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_method_that_rounds_in_its_own_way_is_not_estimated_as_if_it_did_not() -> None:
    class Own(Quantize):
        def alone(self, weight: Tensor, *given: Any) -> Any:
            return super().alone(weight / 2, *given)

    source = torch.Generator().manual_seed(0)
    seen: Any = Seen(128, 64, source)
    weight = torch.randn(128, 64, generator=source).double()
    assert Quantize().estimates(weight, seen, CHOICES, source)
    assert not Own().estimates(weight, seen, CHOICES, source)


def test_estimates_that_miss_a_choice_are_refused(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantize, "estimates", lambda *_: {2: 1.0})
    with pytest.raises(RankwiseError, match=r"quantize estimates losses of \[2\] bits, asked for \[2, 3, 4\]"):
        compress(recipe_from(settings(method="quantize", budget={"bits": 3.5, "rank_multiple": 1})))
