"""Load a causal language model and its tokenizer, with errors that say what is wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rankwise.checkpoints.auto import auto_class, require_causal, require_language_model
from rankwise.checkpoints.compressed import fetched, is_compressed, require_known_format, unreadable
from rankwise.checkpoints.gguf import gguf_config, gguf_tokenizer, is_gguf, read_gguf
from rankwise.checkpoints.modeling_file import compressed_class
from rankwise.checkpoints.sources import (
    ADAPTER_CONFIG,
    check_tensors,
    merge_adapter,
    prepare_quantised,
    require_model,
    require_numbers,
)
from rankwise.checkpoints.verify import read_json, verify_checkpoint
from rankwise.errors import ModelError, NotFiniteError
from rankwise.layers import cache_dense
from rankwise.linalg import all_finite
from rankwise.models import Streaming, text_config
from rankwise.reading import one_line

CACHE_KEY = "rankwise_cache_dense"
"""The key in a config that says whether quantised layers keep their weight dequantised; `"auto"` where it fits."""


_DIGESTED = 2**22
"""Numbers that are hashed at a time."""

_NOWHERE = ".no-adapter"
"""Where transformers is told to look for an adapter."""


@dataclass
class LoadedModel:
    """A model in memory, in the precision it computes in.

    Attributes:
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer, or None when the directory has none.
        source: directory or hub name it came from.
        precision: `auto`, `stored` or `float32`, see `load_model`.
        stored_dtypes: by parameter name, the dtype of the checkpoint, to which weights go back when saved.
        notes: what else the source held, and what became of it.
        streaming: holds weights in files and blocks ready; None for a model that is whole in memory.
    """

    model: Any
    tokenizer: Any
    source: str
    precision: str
    stored_dtypes: dict[str, torch.dtype]
    notes: list[str] = field(default_factory=list)
    streaming: Streaming | None = None

    @property
    def vocabulary(self) -> int:
        embedding = self.model.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens that the config states, or None."""
        return getattr(text_config(self.model.config), "max_position_embeddings", None)

    def to_stored_dtypes(self) -> None:
        """Cast parameters back to the checkpoint's dtypes. Buffers (rotary frequencies) keep theirs.

        Raises:
            NotFiniteError: naming a parameter that is beyond the range of its type.
        """
        for name, parameter in self.model.named_parameters():
            if self.stored_dtypes.get(name, parameter.dtype) != parameter.dtype:
                dtype, streaming = self.stored_dtypes[name], self.streaming
                narrow = streaming.stored(name, parameter, dtype) if streaming else parameter.data.to(dtype)
                if not all_finite(narrow):
                    raise NotFiniteError(
                        f"A number does not fit {str(narrow.dtype).removeprefix('torch.')}, which it is stored in.",
                        where=name,
                        remedy="store the original in bfloat16 or float32 and compress that",
                    )
                parameter.data = narrow
        if self.streaming:
            self.streaming.dtype = None
            # What was read is on the CPU again.
            self.streaming.to_compute()

    def to_compute_dtypes(self) -> None:
        """Cast parameters to the precision they compute in, remembering what they are stored in."""
        self.stored_dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        device = self.streaming.device if self.streaming else self.model.device
        widens = self.precision == "float32" or (self.precision == "auto" and device.type == "cpu")
        if self.streaming:
            self.streaming.dtype = torch.float32 if widens else None
            self.streaming.to_compute()
        elif widens:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float()

    def settle(self, name: str) -> None:
        """Put what a module holds into files, where the model's weights lie in files."""
        if self.streaming:
            self.streaming.settle(self.model.get_submodule(name))


def read_config(source: str, trust_remote_code: bool) -> Any:
    """The config of a checkpoint, as transformers reads it.

    Raises:
        ModelError: when there is none, or it is of no known architecture.
    """
    if is_gguf(source):
        return gguf_config(source)
    folder = Path(source)
    if folder.is_dir():
        raw = read_json(folder / "config.json")
        if "model_type" not in raw:
            raise ModelError(
                "The config names no model_type.",
                where=str(folder / "config.json"),
                remedy="use a Hugging Face checkpoint",
            )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as problem:
        first = one_line(problem)
        if folder.is_dir():
            raise ModelError(
                f"The config is of no architecture that transformers knows ({first[:200]}).",
                where=str(folder / "config.json"),
                remedy="a newer transformers may know it; if the model ships code, add --trust-remote-code",
            ) from None
        raise unreadable(source, problem) from None
    return config


def load_tokenizer(source: str, trust_remote_code: bool = False, config: Any = None) -> Any:
    """The tokenizer, or None when the directory has none.

    Args:
        source: directory or hub name.
        trust_remote_code: run code that it ships.
        config: of the model, where it was read already; a compressed one that is read here is warned of.

    Raises:
        ModelError: when its files are there and cannot be read.
    """
    if is_gguf(source):
        return gguf_tokenizer(source)
    folder = Path(source)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder.is_dir() and not any((folder / name).exists() for name in files):
        return None
    try:
        given = {} if config is None else {"config": config}
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **given)
    except Exception as problem:
        raise ModelError(
            f"The tokenizer cannot be read ({type(problem).__name__}: {one_line(problem)}).",
            where=source,
            remedy="fetch the tokenizer files again",
        ) from None


def name_decoder(model: Any) -> None:
    """Where a class says a name of its decoder that is none of its children, say the right one.

    Args:
        model: as transformers loaded it; changed in place.
    """
    if model.base_model is not model:
        return
    decoders = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(decoders) == 1:
        model.base_model_prefix = decoders[0]


def load_model(
    source: str,
    *,
    precision: str = "auto",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    files: Path | None = None,
) -> LoadedModel:
    """Load a checkpoint: dense or compressed, from a directory or the hub.

    Args:
        source: directory or hub name.
        precision: `stored` computes in the checkpoint's dtype, `float32` casts up, `auto` casts up on a CPU only.
        device: where to put the model; the CPU by default.
        trust_remote_code: run code that the checkpoint ships. Checkpoints of rankwise need no such leave.
        files: a folder: weights stay in files, those that a run makes in this folder, and one block at a time is cast
            and moved; see `rankwise.models.streaming`. None for the whole model in memory.

    Raises:
        ModelError: when the directory is incomplete or damaged, or no causal language model.
        NotFiniteError: naming a parameter that holds NaN or an infinity.
    """
    device = device or torch.device("cpu")
    named, source = source, fetched(source)
    folder = Path(source)
    if folder.is_dir():
        try:
            require_model(folder)
            verify_checkpoint(folder)
        except ModelError as problem:
            if source == named:
                raise
            raise ModelError(
                f"What was downloaded of the checkpoint is not whole. {problem.problem}",
                where=f"{named}: {problem.where}",
                remedy="the same command with a network fetches what is missing, if the hub has it",
            ) from None
    elif "/" in source and not is_gguf(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError("There is no such model directory.", where=source, remedy="check the path")
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    if folder.is_dir():
        # The adapter that may lie there is merged below; transformers would put it beside the weights, unsaid.
        options["adapter_kwargs"] = {"subfolder": _NOWHERE}
    quantised, place = "", source
    held = read_gguf(source) if is_gguf(source) else None
    if held is not None:
        place, options = str(held.path.parent), {**options, **held.as_numbers}
    if is_compressed(source):
        require_known_format(source)
        loader = compressed_class(read_json(Path(source) / "config.json"), source)
    else:
        options["config"] = read_config(source, trust_remote_code)
        options["trust_remote_code"] = trust_remote_code
        require_causal(options["config"], source)
        loader = auto_class(options["config"])
        quantised = prepare_quantised(options["config"], source)
    try:
        model, found = loader.from_pretrained(place, **options)
    except Exception as problem:
        raise ModelError(
            f"The model cannot be loaded ({type(problem).__name__}: {one_line(problem, 300)}).",
            where=source,
            remedy="config.json and the weights do not fit together; fetch the model again",
        ) from problem
    if loader is AutoModelForImageTextToText:
        require_language_model(model, source)
    name_decoder(model)
    if getattr(model.config, CACHE_KEY, None) == "auto":
        # Here weights may be trained and compared: who wants them decoded once says so, with `keep_decoded`.
        cache_dense(model, False)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"The weights lack {len(missing)} tensors of the model, {missing[0]!r} first.",
            where=source,
            remedy="fetch the model again; missing tensors would be random",
        )
    if hasattr(model, "peft_config"):
        raise ModelError(
            "The source is a model with an adapter.",
            where=source,
            remedy="fetch it into a directory and give that, so that the adapter is merged",
        )
    notes = check_tensors(model, set(found["unexpected_keys"]), source)
    if held is not None:
        notes.append(held.note)
    if quantised:
        require_numbers(model, quantised, source)
        notes.append(f"the source is quantised by {quantised}; its weights were turned into numbers")
    if folder.is_dir() and (folder / ADAPTER_CONFIG).exists():
        model = merge_adapter(model, folder)
        notes.append(f"the adapter that lies beside the weights ({ADAPTER_CONFIG}) was merged into them")
    model = (model if files else model.to(device)).eval()
    _check_values(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    known = model.config if is_compressed(source) else None
    tokenizer = load_tokenizer(source, trust_remote_code, known)
    streaming = Streaming(model, files, device, None) if files else None
    loaded = LoadedModel(model, tokenizer, named, precision, {}, notes, streaming)
    loaded.to_compute_dtypes()
    return loaded


def _check_values(model: nn.Module) -> None:
    """Raise where what was loaded can be of no sound checkpoint.

    Raises:
        NotFiniteError: naming a parameter or the scales of codes.
        ModelError: naming a layer whose outputs have no place of their own each.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise NotFiniteError(
                "A weight holds NaN or an infinity.",
                where=name,
                remedy="the checkpoint is damaged or was trained to divergence; fetch or train it again",
            )
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name.endswith(".scale") and not torch.isfinite(buffer).all():
            raise NotFiniteError(
                "A scale holds NaN or an infinity.",
                where=name,
                remedy="the checkpoint is damaged; fetch or make it again",
            )
        if name.endswith(".place"):
            there = buffer.long().sort().values
            if not torch.equal(there, torch.arange(len(buffer), device=there.device)):
                raise ModelError(
                    "Outputs of a layer are sent where there is no place, or two to one.",
                    where=name,
                    remedy="the checkpoint is damaged; fetch or make it again",
                )


def fingerprint(model: nn.Module, stored_dtypes: dict[str, torch.dtype]) -> str:
    """Hash of names, shapes, stored dtypes and values of all that is stored: the same weights give the same hash."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(json.dumps([name, list(parameter.shape), str(stored_dtypes.get(name))]).encode())
        # As stored: what it computes in does not change which model it is.
        _digest(digest, parameter, stored_dtypes.get(name, parameter.dtype))
    # Codes and scales are buffers. A dense model stores none.
    stored = model.state_dict().keys()
    for name, buffer in sorted(model.named_buffers()):
        if name in stored:
            digest.update(json.dumps([name, list(buffer.shape), str(buffer.dtype)]).encode())
            _digest(digest, buffer, buffer.dtype)
    return digest.hexdigest()


def _digest(digest: Any, tensor: Tensor, dtype: torch.dtype) -> None:
    """Add a tensor's values in some type, a few million at a time."""
    for part in tensor.detach().contiguous().reshape(-1).split(_DIGESTED):
        digest.update(part.to("cpu", dtype).view(torch.uint8).numpy().data)
