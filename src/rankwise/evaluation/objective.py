"""What a search minimises: perplexity on validation samples plus a weight times the divergence from the original.

Bolaco (arXiv 2405.10616), Eq. 7 and 8. One call is one forward pass over the samples.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.evaluation.predictions import HeadInputs, Predictions, TopK
from rankwise.models import Head, Logits
from rankwise.sizes import Cut

_LARGEST_EXPONENT = 700.0


class ObjectiveSettings(BaseModel):
    """How a plan is judged.

    Attributes:
        kl_weight: weight of the divergence in nats a token. 4.096 is the released code's 1e-3 on a sum over sequences
            of 4,096 tokens; 0 leaves perplexity alone.
        kl_direction: `compressed_original`, as the released code computes, or `original_compressed`, as Eq. 8 reads.
        predictions: how the original's predictions are kept: `head_inputs`, exact, or `top_k` with the others' mass as
            one class, a lower bound. `auto` takes the inputs of the head where making logits of them again costs less
            than a twentieth of the model's parameters, else the top k.
        k: for `top_k`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl_weight: Annotated[float, Field(ge=0)] = 4.096
    kl_direction: Literal["compressed_original", "original_compressed"] = "compressed_original"
    predictions: Literal["auto", "head_inputs", "top_k"] = "auto"
    k: Annotated[int, Field(ge=1)] = 128


_CHEAP_HEAD = 1 / 20


@dataclass
class Objective:
    """Cuts -> perplexity and divergence on fixed samples.

    Make it while the model is dense: that is when the original's predictions are taken.

    Args:
        model: the causal language model, whose layers `set_cuts` steers.
        ids: validation samples, shape `[samples, length]`.
        settings: how plans are judged.
        set_cuts: takes cuts by site name.
        batch_size: samples a batch.

    Attributes:
        predictions_bytes: memory the original's predictions take.
        predictions_form: `head_inputs`, `top_k` or `none`.
        dense_nll: the original's mean loss in nats a token.
        bare_seconds: time of one bare forward pass of the original over the samples.
        kl_error: largest share of the divergence that the top k missed on the first batch of a trial; None while
            exact or not yet measured.
    """

    model: Any
    ids: Tensor
    settings: ObjectiveSettings
    set_cuts: Callable[[Mapping[str, Cut]], None]
    batch_size: int = 8
    predictions_bytes: int = 0
    predictions_form: str = "none"
    dense_nll: float = 0.0
    bare_seconds: float = 0.0
    kl_error: float | None = None
    _kept: list[Predictions] = field(default_factory=list)
    _exact_first: Predictions | None = None
    _head: Head = field(init=False)

    def __post_init__(self) -> None:
        self._device = next(self.model.parameters()).device
        self._batches = [batch.to(self._device) for batch in self.ids.split(self.batch_size)]
        self._head = Head(self.model, self.ids)
        self._keep_predictions()

    def _run(self, batch: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        return self._parts(self._head(batch).predicting(), batch)

    def _parts(self, logits: Logits, batch: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tokens of a batch in one row: which, their log-probabilities, and the loss of each."""
        targets = batch[:, 1:].flatten()
        for part in logits.parts():
            logs = logits.of(part).float().log_softmax(-1)
            yield part, logs, -logs.gather(-1, targets[part, None]).squeeze(-1)

    @torch.inference_mode()
    def _keep_predictions(self) -> None:
        self.predictions_form = self._form()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, batch in enumerate(self._batches):
            started = time.perf_counter()
            logits = self._head(batch).predicting()
            for _, _, losses in self._parts(logits, batch):
                total += losses.double().sum()
            if self._device.type != "cpu":
                float(total)  # Waits for the device, so that the time is the forward's.
            self.bare_seconds += time.perf_counter() - started
            if self.predictions_form == "none":
                continue
            exact = HeadInputs(logits)
            if self.predictions_form == "head_inputs":
                self._kept.append(exact)
            else:
                self._kept.append(TopK((logs for _, logs, _ in self._parts(logits, batch)), self.settings.k))
                self._exact_first = exact if number == 0 and self._head.apart else self._exact_first
        self.dense_nll = float(total) / self.tokens
        if not math.isfinite(self.dense_nll):
            raise NotFiniteError(
                "The original model's loss on the validation samples is NaN or infinite.",
                where="validation",
                remedy="load it with precision float32; if that fails too the model is damaged",
            )
        self.predictions_bytes = sum(kept.bytes for kept in self._kept)

    def _form(self) -> str:
        if self.settings.kl_weight == 0:
            return "none"
        if not self._head.apart:
            return "top_k"
        if self.settings.predictions != "auto":
            return self.settings.predictions
        head = self.model.get_output_embeddings()
        share = head.weight.numel() / sum(p.numel() for p in self.model.parameters())
        return "head_inputs" if share < _CHEAP_HEAD else "top_k"

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    @torch.inference_mode()
    def __call__(self, cuts: Mapping[str, Cut]) -> tuple[float, float, float]:
        """Score cuts: one forward pass, one number read back from the device at its end.

        Returns:
            Value, perplexity, KL in nats a token. Not finite when the model is destroyed.
        """
        self.set_cuts(cuts)
        # [loss, divergence] summed over tokens, on the device.
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        for number, batch in enumerate(self._batches):
            measured = torch.zeros(2, dtype=torch.float64, device=self._device)
            for part, logs, losses in self._run(batch):
                totals[0] += losses.sum(dtype=torch.float64)
                if not self._kept:
                    continue
                direction = self.settings.kl_direction
                measured[0] += self._kept[number].divergence(logs, part, direction).sum(dtype=torch.float64)
                if number == 0 and self._exact_first is not None and self.kl_error is None:
                    measured[1] += self._exact_first.divergence(logs, part, direction).sum(dtype=torch.float64)
            totals[1] += measured[0]
            if number == 0 and self._exact_first is not None and self.kl_error is None:
                bounded, exact = measured.tolist()
                self._measure_error(bounded, exact, batch.numel())
        nll, kl = (totals / self.tokens).tolist()
        perplexity = math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf
        return perplexity + self.settings.kl_weight * kl, perplexity, kl

    def of(self, model: Any) -> Objective:
        """The same judge, with the same original, of another model: one of other layers under the same head.

        Args:
            model: on the same device; it is judged as it stands, whatever the cuts.
        """
        made = copy.copy(self)
        made.model, made.set_cuts, made._exact_first = model, lambda _cuts: None, None
        made._head = Head(model, self.ids)
        made._kept = [each.under(made._head) for each in self._kept]
        return made

    def _measure_error(self, bounded: float, exact: float, tokens: int) -> None:
        if exact > 1e-6 * tokens:
            self.kl_error = max(0.0, 1 - bounded / exact)
            self._exact_first = None

    @torch.inference_mode()
    def sample_perplexities(self, cuts: Mapping[str, Cut]) -> Tensor:
        """Perplexity of every sample under these cuts, shape `[samples]`, float64 on the CPU."""
        self.set_cuts(cuts)
        found = []
        for batch in self._batches:
            losses = torch.cat([losses for _, _, losses in self._run(batch)])
            found.append(losses.view(len(batch), -1).double().mean(-1))
        return torch.cat(found).clamp_max(_LARGEST_EXPONENT).exp().cpu()
