"""What a search minimises: perplexity on validation samples plus a weight times the divergence from the original.

Bolaco (arXiv 2405.10616), Eq. 7 and 8. One call is one forward pass over the samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rankwise.errors import NotFiniteError
from rankwise.evaluation.predictions import HeadInputs, Predictions, TopK
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

    def __post_init__(self) -> None:
        self._device = next(self.model.parameters()).device
        self._batches = [batch.to(self._device) for batch in self.ids.split(self.batch_size)]
        self._keep_predictions()

    @torch.inference_mode()
    def _keep_predictions(self) -> None:
        head = self.model.get_output_embeddings()
        seen: list[Tensor] = []
        form = self._form(head)
        handle = None
        if head is not None:
            handle = head.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        try:
            for number, batch in enumerate(self._batches):
                seen.clear()
                started = time.perf_counter()
                raw = self.model(input_ids=batch, use_cache=False).logits
                if self._device.type != "cpu":
                    float(raw[0, 0, 0])  # Waits for the device, so that the time is the forward's.
                self.bare_seconds += time.perf_counter() - started
                logs = raw[:, :-1].float().log_softmax(-1)
                total -= logs.gather(-1, batch[:, 1:, None]).double().sum()
                flat = logs.flatten(0, 1)
                inputs = seen[0][:, :-1].flatten(0, 1) if seen else None
                if number == 0 and form != "none" and inputs is not None:
                    exact = HeadInputs(inputs.clone(), head)
                    # Some models bend or scale what the head gives; its inputs alone then do not tell the logits.
                    plain = torch.allclose(head(inputs).float().log_softmax(-1), flat, atol=1e-2)
                    if form == "head_inputs" and not plain:
                        form = "top_k"
                    self._exact_first = exact if form == "top_k" and plain else None
                if form == "head_inputs" and inputs is not None:
                    self._kept.append(HeadInputs(inputs.clone(), head))
                elif form == "top_k":
                    self._kept.append(TopK(flat, self.settings.k))
        finally:
            if handle is not None:
                handle.remove()
        self.dense_nll = float(total) / self.tokens
        if not math.isfinite(self.dense_nll):
            raise NotFiniteError(
                "The original model's loss on the validation samples is NaN or infinite.",
                where="validation",
                remedy="load it with precision float32; if that fails too the model is damaged",
            )
        self.predictions_form = form
        self.predictions_bytes = sum(kept.bytes for kept in self._kept)

    def _form(self, head: Any) -> str:
        if self.settings.kl_weight == 0:
            return "none"
        if head is None:
            return "top_k"
        if self.settings.predictions != "auto":
            return self.settings.predictions
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
            logs = self.model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            totals[0] -= logs.gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64)
            if self._kept:
                flat = logs.flatten(0, 1)
                divergence = self._kept[number].divergence(flat, self.settings.kl_direction)
                totals[1] += divergence.sum(dtype=torch.float64)
                if number == 0 and self._exact_first is not None and self.kl_error is None:
                    self._measure_error(flat, float(divergence.sum()))
        nll, kl = (totals / self.tokens).tolist()
        perplexity = math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf
        return perplexity + self.settings.kl_weight * kl, perplexity, kl

    def _measure_error(self, logs: Tensor, bounded: float) -> None:
        assert self._exact_first is not None
        exact = float(self._exact_first.divergence(logs, self.settings.kl_direction).sum())
        if exact > 1e-6 * logs.shape[0]:
            self.kl_error = max(0.0, 1 - bounded / exact)
            self._exact_first = None

    @torch.inference_mode()
    def sample_perplexities(self, cuts: Mapping[str, Cut]) -> Tensor:
        """Perplexity of every sample under these cuts, shape `[samples]`, float64 on the CPU."""
        self.set_cuts(cuts)
        losses = []
        for batch in self._batches:
            logs = self.model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            losses.append(-logs.gather(-1, batch[:, 1:, None]).squeeze(-1).double().mean(-1))
        return torch.cat(losses).clamp_max(_LARGEST_EXPONENT).exp().cpu()
