"""Write a compressed checkpoint, or multiply the factors back into a plain one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from rankwise.checkpoints.auto import auto_class
from rankwise.checkpoints.companions import write_companions
from rankwise.checkpoints.compressed import CHECKPOINT_KEY
from rankwise.checkpoints.load import CACHE_KEY, LoadedModel
from rankwise.checkpoints.modeling_file import MODULE_NAME, auto_map, base_classes, model_type_for, modeling_source
from rankwise.errors import ModelError, NotFiniteError
from rankwise.layers import decode_vocabulary, dense_layer, kind_of, stream_of, vocabulary_entry
from rankwise.layers.needs import (
    FORMAT_VERSION,
    MINIMUM_TRANSFORMERS,
    WITHOUT_BLOCKS,
    WITHOUT_EXPERTS,
    WITHOUT_FACTORS,
    WITHOUT_FORM,
    WITHOUT_GROUPS,
    WITHOUT_LAYOUTS,
    WITHOUT_LEVELS,
    WITHOUT_VOCABULARY,
)
from rankwise.linalg import all_finite
from rankwise.models import GroupedLinear, Site, UnfusedExperts, decoder_blocks, fuse, group, text_config
from rankwise.quantizers.codes import GIVEN


def low_rank_layers(model: Any, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Forms of the replaced layers by path inside the base model, as `replace_linears` takes them."""
    prefix = model.base_model_prefix + "."
    layers = {}
    for site in sites:
        module = site.module(model)
        if hasattr(module, "description"):
            layers[site.name.removeprefix(prefix)] = {"shape": [site.m, site.n], **module.description()}
    return layers


def sizes_of_blocks(model: Any) -> dict[str, dict[str, int]]:
    """Settings of blocks that lost units, by path inside the base model, as `resize_blocks` takes them.

    An architecture whose layers differ by themselves reads what its config says of each, and of nothing else.
    """
    config = model.config
    if not getattr(config, "is_heterogeneous", False) or not config.allow_global_per_layer_attribute_access:
        return {}
    prefix, blocks = decoder_blocks(model)
    inside, names = prefix.removeprefix(model.base_model_prefix + "."), sorted(config.per_layer_attributes)
    own = [config.per_layer_config[index] for index in range(len(blocks))]
    return {f"{inside}.{index}": {name: getattr(each, name) for name in names} for index, each in enumerate(own)}


def _format_of(
    layers: Mapping[str, Mapping[str, Any]],
    blocks: Mapping[str, Any],
    stream: Mapping[str, Any],
    experts: Mapping[str, UnfusedExperts],
    vocabulary: Mapping[str, Any],
    grouped: Sequence[str],
) -> int:
    """The oldest format that can say it."""
    if grouped:
        return FORMAT_VERSION
    if not all(each.layout.said for each in experts.values()):
        return WITHOUT_GROUPS
    if "rank" in vocabulary.get("head", {}):
        return WITHOUT_LAYOUTS
    if "form" in stream:
        return WITHOUT_FACTORS
    if any(_own_levels(form) for form in layers.values()):
        return WITHOUT_FORM
    if vocabulary:
        return WITHOUT_LEVELS
    if blocks or stream or any(form.get("storage") == "dense" for form in layers.values()):
        return WITHOUT_VOCABULARY
    return WITHOUT_BLOCKS if experts else WITHOUT_EXPERTS


def _own_levels(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's codes are of a codebook that its name spells out."""
    form = layer.get("form", {})
    parts = [form[part] for part in ("q", "factors") if form.get(part) is not None]
    return any(part["codebook"].startswith(GIVEN) for part in parts)


def is_plain(model: Any, sites: Sequence[Site]) -> bool:
    """Whether the architecture's own code and config say all of a model: no layer of ours, no block of a size of its
    own, no adapters of a stream, no vocabulary of codes or factors.
    """
    ours = low_rank_layers(model, sites), sizes_of_blocks(model), stream_of(model), vocabulary_entry(model)
    return not any(ours)


def _write_weights(model: Any, folder: Path, max_shard_size: str) -> None:
    # Tied weights are left out here: the library would name them in the header, in an order that changes.
    tied = getattr(model, "all_tied_weights_keys", {})
    check_finite(model)
    state = {name: _alone(tensor) for name, tensor in model.state_dict().items() if name not in tied}
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _alone(tensor: Tensor) -> Tensor:
    """A tensor in memory of its own: a view of one (an expert's weight) counts in a file as what it is a part of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_finite(model: nn.Module) -> None:
    """Raise when a number became NaN or infinite in the type that it is stored in.

    Buffers of the architecture's own are stored as they came; some are infinite (bounds of Gemma 4's clipped layers).

    Raises:
        NotFiniteError: naming the tensor.
    """
    ours = [name for name, module in model.named_modules() if type(module).__module__.startswith("rankwise.")]
    mine = {f"{path}.{name}": each for path in ours for name, each in model.get_submodule(path).named_buffers()}
    for name, tensor in {**dict(model.named_parameters()), **mine}.items():
        if not all_finite(tensor):
            raise NotFiniteError(
                f"A number is out of the range of {str(tensor.dtype).removeprefix('torch.')}, in which it is stored.",
                where=name,
                remedy="a model in float16 may need --set budget.storage=two_factor, or conversion to bfloat16 first",
            )


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
    source = modeling_source(*classes, model.base_model_prefix)
    config = json.loads(model.config.to_json_string(use_diff=False))
    base_type = classes[0].model_type  # type: ignore[attr-defined]
    prefix = model.base_model_prefix + "."
    layers, blocks = low_rank_layers(model, sites), sizes_of_blocks(model)
    experts = {
        name.removeprefix(prefix): each for name, each in model.named_modules() if isinstance(each, UnfusedExperts)
    }
    grouped = [name.removeprefix(prefix) for name, each in model.named_modules() if isinstance(each, GroupedLinear)]
    stream, vocabulary = stream_of(model), vocabulary_entry(model)
    config.update(
        model_type=model_type_for(base_type),
        architectures=[f"Rankwise{classes[2].__name__}"],
        auto_map=auto_map(*classes),
        **{
            CHECKPOINT_KEY: {
                "format": _format_of(layers, blocks, stream, experts, vocabulary, grouped),
                "needs": {"transformers": f">={MINIMUM_TRANSFORMERS}"},
                "base_model_type": base_type,
                "base_architecture": classes[2].__name__,
                "layers": layers,
                **({"experts": list(experts)} if experts else {}),
                **({"grouped": grouped} if grouped else {}),
                **({"decoder": prefix[:-1]} if prefix[:-1] != classes[2].base_model_prefix else {}),  # type: ignore[attr-defined]
                **({"blocks": blocks} if blocks else {}),
                **({"stream": stream} if stream else {}),
                **({"vocabulary": vocabulary} if vocabulary else {}),
            }
        },
    )
    if any(hasattr(module, "cache") for module in model.modules()):
        # A key of its own, so that from_pretrained(..., rankwise_cache_dense=True) sets it.
        config[CACHE_KEY] = "auto"
    _write_weights(model, folder, max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / f"{MODULE_NAME}.py").write_text(source)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained: it refuses settings that many published models carry.
        generation.to_json_file(folder / "generation_config.json")
    write_companions(loaded, folder, base_type)


def _parameter_names(config: Any) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in auto_class(config).from_config(config).named_parameters()}


def _no_place(model: Any, where: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} has no place for the bias that compression added.",
        where=where,
        remedy="compress with --set method.bias=false (compensation=none where units go), or without --format dense",
    )


def densify(loaded: LoadedModel, sites: Sequence[Site]) -> None:
    """Multiply the factors back, in place, join experts and groups, and let the config admit biases that were added.

    Raises:
        ModelError: when the original architecture has no place for an added bias.
    """
    model = loaded.model
    decode_vocabulary(model)
    for site in sites:
        module = site.module(model)
        kind = kind_of(module)
        if kind.replaced:
            # Codes have no dtype of their own; they take that of the embeddings.
            own = next(module.parameters()) if kind.in_numbers else model.get_input_embeddings().weight
            dense = dense_layer(module.dense_weight(), module.dense_bias(), site.transposed, own.dtype, own.device)
            model.set_submodule(site.name, dense)
    try:
        fuse(model)
        group(model)
    except ValueError as problem:
        raise _no_place(model, str(problem)) from None
    have = {name for name, _ in model.named_parameters()}
    if not have <= _parameter_names(model.config):
        for flag in ("attention_bias", "mlp_bias", "use_bias", "bias"):
            if getattr(text_config(model.config), flag, None) is False:
                setattr(text_config(model.config), flag, True)
    wanted = _parameter_names(model.config)
    if have - wanted:
        raise _no_place(model, min(have - wanted))
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
    check_finite(loaded.model)
    loaded.model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_companions(loaded, folder, loaded.model.config.model_type)
