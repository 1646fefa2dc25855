"""Taking inputs out: the identities of Optimal Brain Surgeon for a layer, on matrices that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg import compensated, damped, removal_losses, removal_order


def drawn(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """W of shape `[m, n]` and a covariance with strong correlations."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=source, dtype=torch.float64)
    mixed = torch.randn(n, n, generator=source, dtype=torch.float64)
    return weight, damped(mixed @ mixed.T / n, 1e-3)


def lost(weight: Tensor, covariance: Tensor, stays: Tensor, made: Tensor) -> float:
    """tr(E Sigma E^T) where W' reads the inputs that stay."""
    error = weight.clone()
    error[:, stays] -= made
    return float((error @ covariance * error).sum())


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 6), st.sampled_from([1, 2, 3]))
def test_losses_are_those_of_the_schur_complement_and_are_reached(seed: int, m: int, units: int, size: int) -> None:
    weight, covariance = drawn(seed, m, units * size)
    order = removal_order(weight, covariance, size, steps=units)
    losses = removal_losses(weight, covariance, order, size)
    assert sorted(order.tolist()) == list(range(units))
    assert losses[-1] == 0
    assert (losses.diff() <= 1e-9).all()
    for count in range(1, units):
        inputs = (order[:count, None] * size + torch.arange(size)).flatten()
        gone = torch.tensor([i for i in range(units * size) if i not in inputs.tolist()])
        cross = covariance[gone][:, inputs]
        schur = covariance[gone][:, gone] - cross @ torch.linalg.solve(covariance[inputs][:, inputs], cross.T)
        expected = float((weight[:, gone] @ schur * weight[:, gone]).sum())
        reached = lost(weight, covariance, inputs, compensated(weight, covariance, inputs))
        assert float(losses[count]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert reached == pytest.approx(expected, rel=1e-6, abs=1e-9)
        # A bias alone leaves the whole of it (FLAP), never less.
        assert lost(weight, covariance, inputs, weight[:, inputs]) >= expected - 1e-9


@given(st.integers(0, 10_000), st.integers(3, 8))
def test_the_first_to_go_is_the_one_that_costs_least(seed: int, n: int) -> None:
    weight, covariance = drawn(seed, 3, n)
    order = removal_order(weight, covariance, 1, steps=n)
    alone = [
        lost(weight, covariance, stays, compensated(weight, covariance, stays))
        for gone in range(n)
        for stays in [torch.tensor([i for i in range(n) if i != gone])]
    ]
    assert int(order[-1]) == min(range(n), key=lambda i: alone[i])


def test_inputs_that_say_the_same_as_others_cost_nothing() -> None:
    """Of two equal inputs one is enough, whatever their columns hold; by their columns' norm both would matter most."""
    x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 0]
    covariance = damped(x.T @ x / len(x), 1e-9)
    weight = torch.tensor([[5.0, 1.0, 1.0, 5.0]], dtype=torch.float64)
    order = removal_order(weight, covariance, 1)
    losses = removal_losses(weight, covariance, order, 1)
    assert int(order[-1]) in (0, 3)
    assert float(losses[3]) < 1e-6 * float(losses[0])
    made = compensated(weight, covariance, torch.tensor([0, 1, 2]))
    assert made.tolist()[0] == pytest.approx([10, 1, 1], abs=1e-3)


def test_independent_inputs_are_not_compensated() -> None:
    weight = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    stays = torch.tensor([0, 2])
    assert torch.equal(compensated(weight, torch.eye(3, dtype=torch.float64), stays), weight[:, stays])


def test_few_steps_give_another_order_of_the_same_units() -> None:
    weight, covariance = drawn(3, 4, 12)
    one, few = (removal_order(weight, covariance, 1, steps=steps) for steps in (12, 2))
    assert sorted(few.tolist()) == sorted(one.tolist())
    half = [float(removal_losses(weight, covariance, order, 1)[6]) for order in (one, few)]
    assert half[0] <= half[1] * 1.2


def test_a_covariance_of_zero_is_taken_for_the_identity() -> None:
    assert torch.equal(damped(torch.zeros(3, 3), 0.1), torch.eye(3))
