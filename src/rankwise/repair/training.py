"""Training of a compressed model's few free parameters by the transformers Trainer.

The loss is that of language modelling (`lm`) or the divergence from the original model's predictions (`kl`). What is
trained, and how it goes back into the factors, is the business of the files beside this one.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.data.instructions import IGNORED
from rankwise.device import computed_type, computing
from rankwise.errors import MissingPackageError, NotFiniteError, RecipeError
from rankwise.layers import kind_of, substitute
from rankwise.models import Head, Logits, Site
from rankwise.progress import Reporter
from rankwise.repair.kept import last_checkpoint, seal_checkpoint
from rankwise.repair.parameters import relative_groups, trainable

Teacher = Callable[[Tensor, Tensor], Logits]
"""Token ids and attention mask, both `[batch, tokens]` -> logits of the original model."""

_WEIGHTS = "trained.safetensors"


class Training(BaseModel, ABC):
    """How parameters are trained.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples a step.
        micro_batch: examples in memory at a time; gradients are accumulated up to `batch_size`.
        lr: step size of Adam, warmed up and then falling as a cosine.
        relative: whether `lr` is relative to the root mean square of each tensor.
        loss: `lm`, or `kl` to the original model.
        warm_up: fraction of the steps.
        save_every: steps between checkpoints of the training itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[float, Field(gt=0)] = 2
    batch_size: Annotated[int, Field(ge=1)] = 16
    micro_batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 0.01
    relative: bool = True
    loss: Literal["kl", "lm"] = "kl"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    save_every: Annotated[int, Field(ge=1)] = 100

    def open(self, model: Any, sites: Sequence[Site]) -> None:
        """Make what is trained numbers in float32: every layer of numbers becomes two factors, components in order.

        Args:
            model: compressed; changed in place.
            sites: all sites.

        Raises:
            RecipeError: when the model has no such layer.
        """
        found = False
        for site in sites:
            layer = site.module(model)
            kind = kind_of(layer)
            if kind.replaced and kind.in_numbers:
                factors = kind.factors(layer)
                substitute(model, site.name, factors.reduced(factors.rank)[0], "two_factor", torch.float32)
                found = True
        if not found:
            raise RecipeError(
                "The checkpoint is quantised.", where="finetune", remedy="use --method lowrank, which trains L and R"
            )

    def require(self) -> None:
        """Raise unless what the training needs is installed.

        Raises:
            MissingPackageError: saying what to install.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise MissingPackageError("Training needs accelerate.", remedy="pip install 'rankwise[train]'")

    def changes(self, model: Any, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
        """What the model has other values of once what was trained is folded in, by name.

        Args:
            model: with nothing attached yet; its factors are balanced.
            sites: all sites.
        """
        return trainable(model, sites, getattr(self, "norms", False))

    @abstractmethod
    def attach(self, model: Any, sites: Sequence[Site], seed: int) -> dict[str, nn.Parameter]:
        """Put into the model what is trained, where it is not there already.

        Args:
            model: changed in place.
            sites: all sites.
            seed: for what is drawn.

        Returns:
            The parameters to train, by name.
        """

    def fold_in(self, model: Any, sites: Sequence[Site], limits: Mapping[str, int]) -> dict[str, Any]:
        """Bring what was trained into the factors.

        Args:
            model: changed in place.
            sites: all sites.
            limits: by site name, the rank beyond which a site does not grow.

        Returns:
            What a report says of it.
        """
        return {}

    def settle(self, model: Any, sites: Sequence[Site]) -> None:
        """Bring numbers beside codes into the 16-bit type they are saved in; factors are stored by the flow."""


def steps_of(settings: Training, count: int) -> int:
    """Steps of the optimiser for a training on `count` examples; the last step of an epoch may be a short one."""
    micro, accumulate = _micro(settings)
    return max(1, round(settings.epochs * math.ceil(math.ceil(count / micro) / accumulate)))


def _micro(settings: Training) -> tuple[int, int]:
    """Examples in memory at a time, and how many times that make up `batch_size` exactly."""
    size = settings.batch_size
    accumulate = next(a for a in range(math.ceil(size / settings.micro_batch), size + 1) if size % a == 0)
    return size // accumulate, accumulate


@dataclass(frozen=True)
class _Rows(torch.utils.data.Dataset):
    ids: Sequence[Tensor]
    labels: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad on the right; padding is masked and not learned from."""

    def padded(key: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = padded("input_ids", 0)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", IGNORED)}


def token_losses(logits: Logits, labels: Tensor, teacher_logits: Logits | None) -> Tensor:
    """The loss summed over the tokens that are learned from.

    Args:
        logits: of every token, shape `[batch, tokens]`.
        labels: shape `[batch, tokens]`; a token is predicted from the one before it.
        teacher_logits: the original's, for KL(original || compressed); None for language modelling.
    """
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    goal = None if teacher_logits is None else teacher_logits.predicting(wanted)

    def loss(raw: Tensor, part: slice) -> Tensor:
        if goal is None:
            return nn.functional.cross_entropy(raw.float(), targets[part], reduction="sum")
        with torch.no_grad():
            original = goal.of(part).float().log_softmax(-1)
        return nn.functional.kl_div(raw.float().log_softmax(-1), original, reduction="sum", log_target=True)

    return logits.predicting(wanted).sum(loss)


@torch.no_grad()
def mean_loss(model: Any, examples: Any, settings: Training, teacher: Teacher | None) -> float:
    """The loss a token over all examples, as training counts it.

    Args:
        model: the model.
        examples: `rankwise.data.Examples`.
        settings: say which loss, and how many examples at a time.
        teacher: the original's predictions; needed for `kl`.
    """
    rows = _Rows(examples.ids, examples.labels)
    total, count = 0.0, 0
    device = next(model.parameters()).device
    head = Head(model, rows.ids[0][None])
    for start in range(0, len(rows), settings.micro_batch):
        batch = _collate([rows[i] for i in range(start, min(start + settings.micro_batch, len(rows)))])
        batch = {key: value.to(device) for key, value in batch.items()}
        goal = (
            None if settings.loss == "lm" or teacher is None else teacher(batch["input_ids"], batch["attention_mask"])
        )
        logits = head(batch["input_ids"], batch["attention_mask"])
        total += float(token_losses(logits, batch["labels"], goal))
        count += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total / max(1, count)


def train(
    model: Any,
    parameters: dict[str, nn.Parameter],
    examples: Any,
    settings: Training,
    *,
    teacher: Teacher | None,
    folder: Path,
    seed: int,
    reporter: Reporter | None = None,
    step_done: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[dict[str, float]]:
    """Train, in place. A training that was killed goes on from its last checkpoint in `folder`.

    Args:
        model: the compressed model, every parameter frozen.
        parameters: what is trained, by name.
        examples: `rankwise.data.Examples`.
        settings: how.
        teacher: the original's predictions; needed for `kl`.
        folder: for checkpoints of the training.
        seed: for the order of examples.
        reporter: told that a checkpoint of the training is damaged, when it is.
        step_done: told step, number of steps, and loss.

    Returns:
        The loss curve: step, loss a token in nats, and step size.

    Raises:
        MissingPackageError: when accelerate is not installed.
        NotFiniteError: when the loss is no longer finite.
    """
    settings.require()
    import accelerate
    from transformers import Trainer, TrainerCallback, TrainingArguments

    micro, accumulate = _micro(settings)
    steps = steps_of(settings, len(examples))
    device = next(model.parameters()).device
    if device.index not in (None, 0):
        raise RecipeError(
            f"Training runs on the first GPU, not on {device}.",
            where="device",
            remedy=f"set CUDA_VISIBLE_DEVICES={device.index} and use --device cuda",
        )
    head = Head(model, examples.ids[0][None])
    half = computed_type(model) if device.type != "cpu" else torch.float32
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warm_up * steps),
        weight_decay=0.0,
        bf16=half == torch.bfloat16,
        fp16=half == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        # The last but one stays until the last is listed: a kill in between loses no more than that.
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        seed=seed,
        log_level="error",
    )

    # One device, the model's: several GPUs would each take a batch, and make more of one step than was asked for.
    arguments._n_gpu = min(1, arguments.n_gpu)

    class Told(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seal_checkpoint(folder / f"checkpoint-{state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise NotFiniteError(
                        "The loss of the training is NaN or infinite.",
                        where=f"step {state.global_step}",
                        remedy="lower lr",
                    )
                step_done(state.global_step, steps, float(logs["loss"]))

    class Recovery(Trainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # Dropout stays off: the model is repaired, not trained anew.
            model.eval()
            labels, ids, mask = inputs["labels"], inputs["input_ids"], inputs["attention_mask"]
            whole = bool(mask.all())
            goal = None
            with computing(model):
                if settings.loss == "kl":
                    assert teacher is not None
                    with torch.no_grad():
                        goal = teacher(ids, mask)
                logits = head(ids, None if whole else mask)
            count = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORED).sum()
            with computing(model):
                loss = token_losses(logits, labels, goal).float() / count
            return (loss, {}) if return_outputs else loss

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            """Only what is trained: the rest does not change."""
            target = Path(output_dir or folder)
            target.mkdir(parents=True, exist_ok=True)
            save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, target / _WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            for name, values in load_file(Path(resume_from_checkpoint) / _WEIGHTS).items():
                parameters[name].data.copy_(values)

    if settings.relative:
        groups = relative_groups(parameters.values(), settings.lr)
    else:
        groups = [{"params": list(parameters.values()), "lr": settings.lr}]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    use_cache = getattr(model.config, "use_cache", None)
    try:
        trainer = Recovery(
            model=model,
            args=arguments,
            train_dataset=_Rows(examples.ids, examples.labels),
            data_collator=_collate,
            callbacks=[Told()],
            optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0), None),
        )
        trainer.model_accepts_loss_kwargs = True
        # Whatever the model's own loss does, ours does not count the first token, which is predicted from nothing.
        trainer._loss_shifts_labels = True
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        last = last_checkpoint(folder, reporter or Reporter(show=False))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        history = [
            {"step": row["step"], "loss": row["loss"], "lr": row["learning_rate"]}
            for row in trainer.state.log_history
            if "loss" in row
        ]
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        model.eval()
        # The Trainer leaves marks on the model: a setting that would be saved, and on a GPU a wrapped forward.
        if use_cache is not None:
            model.config.use_cache = use_cache
        if hasattr(model, "_original_forward"):
            accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return history
