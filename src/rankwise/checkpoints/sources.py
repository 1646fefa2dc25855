"""Whether the model in memory is the one that a source describes: what lies beside it, and what is left out."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from rankwise.errors import ModelError
from rankwise.models import decoder_blocks

ADAPTER_CONFIG = "adapter_config.json"
"""What peft calls the file that makes a directory an adapter, or a model with one."""

_DEQUANTISED = ("fp8", "mxfp4")
"""What transformers turns into numbers by itself, to the last bit of what the codes say, on any machine."""

_TABLES = re.compile(r"(^|\.)((attn|attention|self_attn)\.bias|masked_bias|position_ids|inv_freq|causal_mask)$")
"""Masks and tables that older checkpoints hold and models now make themselves."""

_SHOWN = 5


def require_model(folder: Path) -> None:
    """Raise when a directory is an adapter without its model.

    Raises:
        ModelError: saying so.
    """
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        raise ModelError(
            "This is an adapter, not a model: it holds changes to one.",
            where=str(folder / ADAPTER_CONFIG),
            remedy="merge it first (peft: merge_and_unload, save_pretrained) and give the merged model",
        )


def prepare_quantised(config: Any, source: str) -> str:
    """Have a quantised source turned into numbers, if that is possible.

    Args:
        config: of the model; changed in place.
        source: for errors.

    Returns:
        What it is quantised by; empty for numbers.

    Raises:
        ModelError: where the weights cannot be had as numbers.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return ""
    settings = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "an unnamed method"))
    if method not in _DEQUANTISED:
        raise ModelError(
            f"The weights are codes already (quantised by {method}); a decomposition needs the numbers.",
            where=source,
            remedy="give the checkpoint that it was quantised from, or dequantise it with the library that made it",
        )
    config.quantization_config = {**settings, "dequantize": True}
    return method


def require_numbers(model: Any, method: str, source: str) -> None:
    """Raise unless a source that was quantised is numbers now, and says so.

    Raises:
        ModelError: naming a tensor.
    """
    codes = [name for name, p in model.named_parameters() if not p.is_floating_point() or p.dtype.itemsize < 2]
    if not codes and getattr(model.config, "quantization_config", None) is None:
        return
    raise ModelError(
        f"The weights, quantised by {method}, could not be turned into numbers.",
        where=codes[0] if codes else source,
        remedy="give the checkpoint that it was quantised from",
    )


def check_tensors(model: Any, unexpected: set[str], source: str) -> list[str]:
    """Notes on tensors that the model has no place for.

    Args:
        model: as it was loaded.
        unexpected: names of those tensors.
        source: for errors.

    Returns:
        What was left out that does not change what the decoder computes: heads for something else, for one.

    Raises:
        ModelError: naming those that lie within what the model has, so that it would compute something else.
    """
    if not unexpected:
        return []
    prefix, blocks = decoder_blocks(model)
    modules = {name for name, _ in model.named_modules() if name}
    within: list[str] = []
    outside: list[str] = []
    for name in sorted(unexpected):
        if _TABLES.search(name):
            continue
        known = name.startswith(f"{prefix}.") or name.rpartition(".")[0] in modules
        (within if known else outside).append(name)
    if within:
        later = [name for name in within if _index_after(name, prefix) >= len(blocks)]
        reason = "they are part of what the config describes otherwise"
        if later:
            reason = f"the config has {len(blocks)} blocks, and {later[0]!r} is of one after them"
        raise ModelError(
            f"The weights hold {len(within)} tensors that the model has no place for, {_names(within)}: {reason}.",
            where=source,
            remedy="config.json and the weights are of two models; fetch both again",
        )
    if not outside:
        return []
    return [f"{len(outside)} tensors of the source are no part of the decoder and are left out: {_names(outside)}"]


def _index_after(name: str, prefix: str) -> int:
    first = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(first) if name.startswith(f"{prefix}.") and first.isdigit() else -1


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def merge_adapter(model: Any, folder: Path) -> Any:
    """A model with the adapter that lies beside its weights merged, as every load by transformers applies it.

    Args:
        model: without the adapter.
        folder: holds it.

    Raises:
        ModelError: when it cannot be merged.
    """
    remedy = f"move {ADAPTER_CONFIG} away to take the model without it, or merge it with peft and give the result"
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(
            "An adapter lies beside the weights, and peft, which merges it, is not installed.",
            where=str(folder / ADAPTER_CONFIG),
            remedy=f"pip install 'rankwise[train]'; or {remedy}",
        ) from None
    try:
        with warnings.catch_warnings():
            # It warns of tensors that the adapter should have, and goes on with random ones.
            warnings.filterwarnings("error", message=".*adapter keys.*")
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as problem:
        first = str(problem).strip().partition("\n")[0][:200]
        raise ModelError(
            f"The adapter beside the weights cannot be merged ({type(problem).__name__}: {first}).",
            where=str(folder / ADAPTER_CONFIG),
            remedy=remedy,
        ) from None
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    merged._hf_peft_config_loaded = False
    return merged
