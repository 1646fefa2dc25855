"""Models in one GGUF file, the form of llama.cpp: read by transformers and the gguf package, codes made numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from rankwise.errors import MissingPackageError, ModelError
from rankwise.reading import one_line

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SHOWN = 4


@dataclass(frozen=True)
class GgufFile:
    """What a file holds.

    Attributes:
        path: of it.
        types: by type of its tensors, numbers that are kept so, the most first.
    """

    path: Path
    types: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """What its weights become: the type that most of them have, or bfloat16 where they are codes."""
        return _NUMBERS.get(next(iter(self.types)), torch.bfloat16)

    @property
    def options(self) -> dict[str, Any]:
        """What transformers is told to read its header."""
        return {"gguf_file": self.path.name}

    @property
    def as_numbers(self) -> dict[str, Any]:
        """What transformers is told to load its weights as numbers."""
        made = {**self.options, "dtype": self.dtype}
        # Those before it had this class loaded numbers always.
        keeping = getattr(transformers, "GgufConfig", None)
        return made if keeping is None else {**made, "quantization_config": keeping(dequantize=True)}

    @property
    def note(self) -> str:
        """What became of it, for a person."""
        whole = sum(self.types.values())
        shares = [f"{name} {count / whole:.1%}" for name, count in self.types.items()]
        listed = ", ".join(shares[:_SHOWN]) + (f" and {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else "")
        became = str(self.dtype).removeprefix("torch.")
        return f"the source is a GGUF file of the types {listed}; its weights were turned into numbers in {became}"


def is_gguf(source: str) -> bool:
    """Whether a source is named like a GGUF file, and is no directory."""
    return source.lower().endswith(".gguf") and not Path(source).is_dir()


def read_gguf(source: str) -> GgufFile:
    """Read what a file holds, its weights left where they are.

    Raises:
        MissingPackageError: when the gguf package is not installed.
        ModelError: when there is no such file, or it is damaged or a part of a model.
    """
    path = Path(source)
    if not path.is_file():
        raise ModelError("There is no such model file.", where=source, remedy="check the path")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError("This is no GGUF file: it does not begin as one.", where=source, remedy="fetch it again")
    if _PART.search(path.name):
        raise ModelError(
            "This is one of several files that hold a model together.",
            where=source,
            remedy="put them together first (llama-gguf-split --merge), and give that file",
        )
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingPackageError(
            "GGUF files need the gguf package.", where=source, remedy="pip install 'rankwise[gguf]'"
        ) from None
    counts: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(path).tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as problem:
        raise ModelError(
            f"The GGUF file is damaged ({type(problem).__name__}: {one_line(problem)}).",
            where=source,
            remedy="fetch it again",
        ) from None
    if not counts:
        raise ModelError("The GGUF file holds no tensors.", where=source, remedy="give one with a model's weights")
    return GgufFile(path, dict(counts.most_common()))


def gguf_config(source: str) -> Any:
    """The config that a file's header stands for.

    Raises:
        ModelError: when it is of no architecture that transformers reads from GGUF; and what `read_gguf` raises.
    """
    found = read_gguf(source)
    try:
        config = AutoConfig.from_pretrained(str(found.path.parent), **found.options)
    except Exception as problem:
        raise ModelError(
            f"The GGUF file is of no architecture that transformers reads from one ({one_line(problem)}).",
            where=source,
            remedy="give the Hugging Face checkpoint that it was made from",
        ) from None
    config.dtype = found.dtype
    return config


def gguf_tokenizer(source: str) -> Any:
    """The tokenizer in a file.

    Raises:
        ModelError: when it cannot be read; and what `read_gguf` raises.
    """
    found = read_gguf(source)
    try:
        return AutoTokenizer.from_pretrained(str(found.path.parent), **found.options)
    except Exception as problem:
        raise ModelError(
            f"The tokenizer in the GGUF file cannot be read ({type(problem).__name__}: {one_line(problem)}).",
            where=source,
            remedy="give the Hugging Face checkpoint that it was made from",
        ) from None
