"""What LDLQ is expected to lose: what follows from shares and noise, and answers of codebooks beside rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise.quantizers import Hessian, Rounding, codebook_named, gaussian_answer, ldlq


def moment(n: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(3 * n, n, generator=draw).double() * torch.linspace(0, 3, n).double().exp()
    mixed = mixed @ torch.randn(n, n, generator=draw).double()
    return mixed.T @ mixed / len(mixed)


def rounding(n: int, seed: int, damping: float = 0.01, rows: int = 50) -> tuple[Rounding, Tensor, Hessian]:
    """A weight about to be rounded, felt twice as it is, with the measured metric of its inputs and the damped one."""
    seen = moment(n, seed)
    hessian = Hessian.of(seen, damping)
    weight = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).double()
    return Rounding.of(hessian, weight, 2 * weight, 8), seen, hessian


@given(n=st.integers(2, 40), seed=st.integers(0, 99), damping=st.sampled_from([0.01, 0.3]))
def test_loss_is_the_error_that_follows_from_shares_and_noise(n: int, seed: int, damping: float) -> None:
    """E = (W A + Z) (I + U (I - A))^-1 weighed by M, for shares and noise that are given."""
    made, seen, hessian = rounding(n, seed, damping)
    blocks = -(-n // 8)
    along, beside = torch.linspace(0.02, 0.2, blocks).double(), torch.linspace(0.3, 0.1, blocks).double()
    known = gaussian_answer(codebook_named("e8p", 2, by_row=True), n, feedback=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounding, "answers", lambda *_: (along, beside))
        found = made.loss(known, trace=100.0)
    shares = along.repeat_interleave(8)
    whole = torch.eye(8 * blocks).double()
    backward = torch.linalg.inv(whole + hessian.feedback(8) * (1 - shares))[:n, :n]
    metric = backward @ seen @ backward.T
    missed = made.weight[:, :n] * shares[:n]
    signal = float(((missed @ metric) * 2 * missed).sum())
    square = float(made.weight.square().sum()) / n
    noise = 100.0 / 50 * square * float((metric.diagonal() * beside.repeat_interleave(8)[:n]).sum())
    assert found == pytest.approx(signal + noise, rel=1e-5)


@pytest.mark.parametrize(("name", "most"), [("e8p", 0.1), ("uniform", 0.14), ("nf", 0.14)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_misses_of_every_block_are_nearly_those_of_rounding(name: str, most: float, bits: int) -> None:
    hessian = Hessian.of(moment(64, 3), 0.01)
    codebook = codebook_named(name, bits, by_row=True)
    weight = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)).double()
    feedback = hessian.feedback(8)
    scale = codebook.scales(weight, feedback=True)
    error = weight - ldlq(weight, feedback, codebook, scale).dense()
    missed = (error + error @ feedback).square().mean(0).unflatten(0, (-1, 8)).mean(1)
    known = gaussian_answer(codebook, 64, feedback=True)
    along, noise = Rounding.of(hessian, weight, weight, 8).answers(known)
    # Beside the noise a share of the target is missed.
    assert (missed / (noise + along.square()) - 1).abs().max() < most
    assert noise[0] == pytest.approx(known.at(1.0)[1], rel=0.05)
    assert noise[-1] > noise[0]


@pytest.mark.parametrize(("name", "bits"), [("e8p", 2), ("uniform", 4), ("nf", 8)])
def test_an_answer_lies_between_those_that_were_tried_and_stays_there(name: str, bits: int) -> None:
    known = gaussian_answer(codebook_named(name, bits, by_row=True), 64, feedback=True)
    assert known.at(1.0) == pytest.approx((known.along[3], known.beside[3]))
    along, beside = known.at(2 ** (1 / 6))
    assert along == pytest.approx((known.along[3] + known.along[4]) / 2)
    assert beside == pytest.approx((known.beside[3] * known.beside[4]) ** 0.5)
    assert known.at(0.0) == pytest.approx((known.along[0], known.beside[0]))
    assert known.at(1e9) == pytest.approx((known.along[-1], known.beside[-1]))
    assert 0 <= known.along[-1] < 1
    assert known.beside[3] == pytest.approx(rounding_error(name, bits), rel=0.1)


def rounding_error(name: str, bits: int) -> float:
    """Of other Gaussian numbers, what is missed beside a share of them."""
    codebook = codebook_named(name, bits, by_row=True)
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(5))
    missed = rows - codebook.quantize(rows, codebook.scales(rows, feedback=True)).dense()
    share = (missed * rows).sum() / rows.square().sum()
    return float((missed - share * rows).square().mean())
