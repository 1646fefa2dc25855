"""Write a compressed checkpoint, or multiply the factors back into a plain one. Directories appear whole or not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from rankwise.checkpoints.load import CACHE_KEY, CHECKPOINT_KEY, FORMAT_VERSION, LoadedModel
from rankwise.checkpoints.modeling_file import MODULE_NAME, auto_map, base_classes, model_type_for, modeling_source
from rankwise.errors import ModelError, OutputError, is_disk_full
from rankwise.layers import dense_layer, kind_of
from rankwise.models import Site

REPORT_FILE = "rankwise_report.json"
"""Every directory that rankwise writes holds this file; only such directories are ever replaced."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(output: Path) -> None:
    """Raise when `output` exists and was not written by rankwise.

    Raises:
        OutputError: saying what is there.
    """
    if output.is_file():
        raise OutputError("The output path is a file.", where=str(output), remedy="give a directory")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).exists():
        raise OutputError(
            "The output directory exists and was not written by rankwise; it is left alone.",
            where=str(output),
            remedy="give another --output, or empty it yourself",
        )


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its place when the block ends well.

    Raises:
        OutputError: when the disk is full or not writable; `output` is then as it was.
    """
    check_output(output)
    output = output.absolute()
    fresh = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        for file in fresh.iterdir():
            # Weight files come out private; give them the mode of every other file.
            file.chmod(0o666 & ~_umask())
        # Survive a power cut too: the contents reach the disk before the name does.
        os.sync()
        if output.exists():
            old = output.with_name(f".{output.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(output, old)
            os.rename(fresh, output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(fresh, output)
    except Exception as problem:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(problem, OSError) or "os error" in str(problem).lower():
            full = is_disk_full(problem)
            raise OutputError(
                "The disk is full." if full else f"The checkpoint cannot be written ({problem}).",
                where=str(output),
                remedy="make room and run the same command again; finished stages are kept"
                if full
                else "check the path and its permissions",
            ) from problem
        raise


def low_rank_layers(model: Any, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Forms of the replaced layers by path inside the base model, as `replace_linears` takes them."""
    prefix = model.base_model_prefix + "."
    layers = {}
    for site in sites:
        module = site.module(model)
        if kind_of(module).replaced:
            layers[site.name.removeprefix(prefix)] = {"shape": [site.m, site.n], **module.description()}
    return layers


def _write_weights(model: Any, folder: Path, max_shard_size: str) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    save_torch_state_dict(
        model.state_dict(),
        folder,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
        shared_tensors_to_discard=list(tied),
    )


def _write_companions(loaded: LoadedModel, folder: Path) -> None:
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained: it refuses settings that many published models carry.
        generation.to_json_file(folder / "generation_config.json")


def save_low_rank(folder: Path, loaded: LoadedModel, sites: Sequence[Site], max_shard_size: str = "5GB") -> None:
    """Write a checkpoint whose replaced layers any transformers can load with `trust_remote_code=True`.

    Args:
        folder: an empty directory.
        loaded: the model, its new layers in place, parameters in their stored dtypes.
        sites: all sites, dense or not.
        max_shard_size: size at which weights are split over files.

    Raises:
        ModelError: when the architecture does not ship with transformers.
    """
    model = loaded.model
    classes = base_classes(model)
    source = modeling_source(*classes)
    config = json.loads(model.config.to_json_string(use_diff=False))
    base_type = classes[0].model_type  # type: ignore[attr-defined]
    config.update(
        model_type=model_type_for(base_type),
        architectures=[f"Rankwise{classes[2].__name__}"],
        auto_map=auto_map(*classes),
        **{
            CHECKPOINT_KEY: {
                "format": FORMAT_VERSION,
                "base_model_type": base_type,
                "base_architecture": classes[2].__name__,
                "layers": low_rank_layers(model, sites),
            }
        },
    )
    if any(hasattr(module, "cache") for module in model.modules()):
        # A key of its own, so that from_pretrained(..., rankwise_cache_dense=True) sets it.
        config[CACHE_KEY] = False
    _write_weights(model, folder, max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / f"{MODULE_NAME}.py").write_text(source)
    _write_companions(loaded, folder)


def _parameter_names(config: Any) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()}


def densify(loaded: LoadedModel, sites: Sequence[Site]) -> None:
    """Multiply the factors back, in place, and let the config admit the biases that compression added.

    Raises:
        ModelError: when the original architecture has no place for an added bias.
    """
    model = loaded.model
    for site in sites:
        module = site.module(model)
        kind = kind_of(module)
        if kind.replaced:
            # Codes have no dtype of their own; they take that of the embeddings.
            own = next(module.parameters()) if kind.in_numbers else model.get_input_embeddings().weight
            dense = dense_layer(module.dense_weight(), module.dense_bias(), site.transposed, own.dtype, own.device)
            model.set_submodule(site.name, dense)
    have = {name for name, _ in model.named_parameters()}
    if not have <= _parameter_names(model.config):
        for flag in ("attention_bias", "mlp_bias", "use_bias", "bias"):
            if getattr(model.config, flag, None) is False:
                setattr(model.config, flag, True)
    wanted = _parameter_names(model.config)
    if have - wanted:
        raise ModelError(
            f"{type(model).__name__} has no place for the bias that compression added.",
            where=min(have - wanted),
            remedy="compress with --set method.bias=false, or without --format dense",
        )
    for name in sorted(wanted - have):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.register_parameter(
            leaf, nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), requires_grad=False)
        )


def save_dense(folder: Path, loaded: LoadedModel, sites: Sequence[Site], max_shard_size: str = "5GB") -> None:
    """Write a plain checkpoint of the original type. It is as large as the original.

    Args and errors as for `save_low_rank` and `densify`; the model in memory becomes dense.
    """
    densify(loaded, sites)
    loaded.model.save_pretrained(folder, max_shard_size=max_shard_size)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
