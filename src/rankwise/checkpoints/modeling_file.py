"""The self-contained modelling file of a compressed checkpoint, and the class it defines.

The file holds the source of the layers (`layers/low_rank.py`, `pivoted.py`, `quantized.py`, `replace.py`), of what
reads codes (`quantizers/codes.py`, `rotation.py`), of experts and groups as plain layers (`models/experts.py`,
`grouped.py`), of blocks of other sizes (`models/resizing.py`), of dense layers with a bias (`layers/biased.py`), of
blocks whose residual stream was cut (`layers/narrow.py`), of embeddings and a head in 8 bits (`layers/vocabulary.py`),
of what it needs (`layers/needs.py`), and three small subclasses of the base architecture.
Loading with `trust_remote_code=True` runs it where rankwise is not installed; rankwise itself builds the same text
afresh and never runs the file it finds in a directory.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from types import ModuleType
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rankwise.errors import ModelError
from rankwise.layers import biased, low_rank, narrow, needs, pivoted, quantized, replace, vocabulary
from rankwise.models import experts, grouped, resizing
from rankwise.quantizers import codes, rotation

MODULE_NAME = "modeling_rankwise"
_GENERATED = "rankwise_generated_"

_TEMPLATE = '''"""{base} with low-rank or quantised linear layers.

Written by rankwise; needs torch and transformers only. The config's `rankwise` entry says which layers are replaced.
"""

{layer_source}


require({{"format": FORMAT_VERSION}})

from {config_module} import {config}
from {model_module} import {causal}, {base}


class Rankwise{config}({config}):
    model_type = "{model_type}"


class Rankwise{base}(FillsAsOriginal, ResizesNot, {base}):
    config_class = Rankwise{config}
    base_model_prefix = "{decoder}"

    def __init__(self, config):
        require(config.rankwise)
        with one_size(config, config.rankwise.get("blocks")):
            super().__init__(config)
        resize_blocks(self, config.rankwise.get("blocks", {{}}))
        narrow_stream(self, config.rankwise.get("stream", {{}}))
        unfuse(self, config.rankwise.get("experts", []))
        ungroup(self, config.rankwise.get("grouped", []))
        replace_linears(self, config.rankwise["layers"], getattr(config, "rankwise_cache_dense", "auto"))
        code_embedding(self, config.rankwise.get("vocabulary", {{}}))
        self.post_init()


class Rankwise{causal}(FillsAsOriginal, ResizesNot, {causal}):
    config_class = Rankwise{config}
    base_model_prefix = "{decoder}"

    def __init__(self, config):
        with one_size(config, config.rankwise.get("blocks")):
            super().__init__(config)
        setattr(self, "{decoder}", without_what_lacks(Rankwise{base}(config), getattr(self, "{decoder}", None)))
        code_head(self, config.rankwise.get("vocabulary", {{}}))
        self.post_init()
'''


def model_type_for(base_model_type: str) -> str:
    """The model type of a compressed checkpoint, one that transformers does not know by itself."""
    return f"rankwise_{base_model_type}"


_SOURCES = (
    needs,
    codes,
    rotation,
    experts,
    grouped,
    resizing,
    biased,
    narrow,
    low_rank,
    pivoted,
    quantized,
    replace,
    vocabulary,
)


def _is_heading(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr | ast.ImportFrom | ast.Import)


def _layer_source() -> str:
    """Source of the layer files without their docstrings, their imports put together at the head."""
    parts: list[str] = []
    whole: set[str] = set()
    named: dict[str, set[str]] = {}
    for module in _SOURCES:
        source = inspect.getsource(module)
        heading = list(itertools.takewhile(_is_heading, ast.parse(source).body))
        for each in heading:
            if isinstance(each, ast.Import):
                whole |= {name.name for name in each.names}
            elif isinstance(each, ast.ImportFrom) and not str(each.module).startswith("rankwise"):
                named.setdefault(str(each.module), set()).update(name.name for name in each.names)
        parts.append("\n".join(source.splitlines()[heading[-1].end_lineno :]).strip())
    imports = [f"import {name}" for name in sorted(whole)]
    imports += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())]
    return "\n".join(imports) + "\n\n\n" + "\n\n\n".join(parts)


def modeling_source(config_class: type, base_class: type, causal_class: type, decoder: str) -> str:
    """Text of the modelling file.

    Args:
        config_class: the base architecture's config class.
        base_class: the class of the decoder without head.
        causal_class: the causal language model's class.
        decoder: name of the decoder in the causal language model.

    Raises:
        ModelError: when the architecture is not one that ships with transformers.
    """
    for each in (config_class, base_class, causal_class):
        if not each.__module__.startswith("transformers.models."):
            raise ModelError(
                f"{each.__name__} does not ship with transformers, so a checkpoint of it cannot stand alone.",
                where=each.__module__,
                remedy="use --format dense",
            )
    return _TEMPLATE.format(
        layer_source=_layer_source(),
        config_module=config_class.__module__,
        model_module=causal_class.__module__,
        config=config_class.__name__,
        base=base_class.__name__,
        causal=causal_class.__name__,
        decoder=decoder,
        model_type=model_type_for(config_class.model_type),  # type: ignore[attr-defined]
    )


def base_classes(model: Any) -> tuple[type, type, type]:
    """The original config, decoder and causal classes of a model, whether it was loaded dense or compressed."""
    found = (type(model.config), type(model.base_model), type(model))
    generated = found[2].__module__.startswith(_GENERATED)
    return tuple(each.__bases__[-1] for each in found) if generated else found  # type: ignore[return-value]


def auto_names(config_class: type, causal_class: type) -> list[str]:
    """The `Auto` classes that load a whole model: those which load the original, the one made for it first.

    Args:
        config_class: the base architecture's config class.
        causal_class: the causal language model's class, or that of the model which reads images too.
    """
    mappings = {
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    found = [name for name, known in mappings.items() if known.get(config_class, None) is causal_class]
    return found or ["AutoModelForCausalLM"]


def auto_map(config_class: type, base_class: type, causal_class: type) -> dict[str, str]:
    """The config's `auto_map` entry."""
    return {
        "AutoConfig": f"{MODULE_NAME}.Rankwise{config_class.__name__}",
        "AutoModel": f"{MODULE_NAME}.Rankwise{base_class.__name__}",
        **dict.fromkeys(auto_names(config_class, causal_class), f"{MODULE_NAME}.Rankwise{causal_class.__name__}"),
    }


def compressed_class(raw_config: dict[str, Any], where: str) -> Any:
    """The class of a compressed checkpoint's whole model, built from rankwise's own text.

    Args:
        raw_config: contents of config.json.
        where: directory, for errors.

    Raises:
        ModelError: when the config names classes that this version cannot build.
    """
    try:
        base_type = raw_config["rankwise"]["base_model_type"]
        names = raw_config["auto_map"]
        from transformers import CONFIG_MAPPING

        config_class = CONFIG_MAPPING[base_type]
        sees = "AutoModelForImageTextToText" in names
        causal_class: Any = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees else MODEL_FOR_CAUSAL_LM_MAPPING)[
            config_class
        ]
        base_name = names["AutoModel"].rpartition(".Rankwise")[2]
        base_class = getattr(sys.modules[causal_class.__module__], base_name)
    except (KeyError, AttributeError, TypeError) as problem:
        raise ModelError(
            f"The config's rankwise entry does not fit this version ({problem}).",
            where=where,
            remedy="a newer transformers or rankwise may know this architecture",
        ) from None
    decoder = raw_config["rankwise"].get("decoder", causal_class.base_model_prefix)
    # It becomes a part of a text that is run.
    if not (isinstance(decoder, str) and decoder.isidentifier()):
        raise ModelError(
            "The config's rankwise entry names a decoder that is no name.",
            where=where,
            remedy="fetch the model's config.json again, from a source that you trust",
        )
    source = modeling_source(config_class, base_class, causal_class, decoder)
    # Under one name in sys.modules, so that pickling and inspection of the classes work.
    module = ModuleType(f"{_GENERATED}{base_type}")
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    # One class of each layer in this process, so that isinstance finds them.
    module.__dict__.update(
        BiasedLinear=biased.BiasedLinear,
        LowRankLinear=low_rank.LowRankLinear,
        PivotedLinear=pivoted.PivotedLinear,
        QuantizedLinear=quantized.QuantizedLinear,
        PackedMatrix=quantized.PackedMatrix,
        Expert=experts.Expert,
        UnfusedExperts=experts.UnfusedExperts,
        unfuse=experts.unfuse,
        GroupedLinear=grouped.GroupedLinear,
        ungroup=grouped.ungroup,
        NarrowNorm=narrow.NarrowNorm,
        narrow_stream=narrow.narrow_stream,
        LAYERS=replace.LAYERS,
        replace_linears=replace.replace_linears,
        CodedEmbedding=vocabulary.CodedEmbedding,
        CodedHead=vocabulary.CodedHead,
        code_embedding=vocabulary.code_embedding,
        code_head=vocabulary.code_head,
        one_size=resizing.one_size,
        resize_blocks=resizing.resize_blocks,
    )
    return getattr(module, f"Rankwise{causal_class.__name__}")
