"""Models in GGUF files: read as the numbers that their codes stand for, said, and refused where they cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Run, failed, tiny_llama
from rankwise.checkpoints import load_model
from rankwise.errors import MissingPackageError, ModelError
from rankwise.quickstart import MODEL

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """A tiny Llama, its matrices in Q8_0; what it stands for by the names that transformers has."""
    model = tiny_llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    config = model.config
    words = json.loads((MODEL / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in words["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    meant = {}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        block, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        own = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
        stored = own.get(name) or f"blk.{block}.{NAMES[rest]}"
        array = values.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(array, kind) if array.ndim > 1 else array
        writer.add_tensor(f"{stored}.weight", packed, raw_dtype=kind)
        unpacked = gguf.quants.dequantize(packed, kind) if array.ndim > 1 else array
        meant[name] = torch.from_numpy(np.array(unpacked))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_its_weights_are_what_its_codes_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    meant = write(path)
    loaded = load_model(str(path))
    state = loaded.model.state_dict()
    for name, values in meant.items():
        # Rows of q and k stand in another order in such a file.
        if "q_proj" not in name and "k_proj" not in name:
            torch.testing.assert_close(state[name], values.bfloat16().float(), atol=0, rtol=0)
        else:
            assert state[name].shape == values.shape
    assert set(loaded.stored_dtypes.values()) == {torch.bfloat16}
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    (note,) = loaded.notes
    assert "GGUF file of the types Q8_0 99.8%, F32 0.2%" in note
    assert "numbers in bfloat16" in note
    assert loaded.tokenizer.decode(loaded.tokenizer("return the").input_ids).endswith("return the")


@pytest.mark.long
def test_it_is_compressed_and_scored(rankwise: Run, text: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write(path)
    words = ["--sequences", 4, "--length", 32, "--calibration", f"text:{text}", "--method", "svd"]
    status, _, err = rankwise("compress", path, "-o", out, "--keep", 0.7, *words)
    assert status == 0, err
    assert "GGUF file of the types" in err
    status, said, err = rankwise("evaluate", path, "--text", f"text:{text}", "--sequences", 4, "--length", 32, "--json")
    assert status == 0, err
    assert json.loads(said)["perplexity"] > 1
    assert (out / "tokenizer.json").is_file()


def test_what_cannot_be_read_is_refused(rankwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"

    def refused(says: str, name: Path = path, kind: Any = ModelError) -> None:
        with pytest.raises(kind, match=says) as problem:
            load_model(str(name))
        assert problem.value.where == str(name)
        assert problem.value.remedy

    refused("no such model file")
    path.write_bytes(b"something else")
    refused("no GGUF file")
    write(path)
    whole = path.read_bytes()
    for cut in (6, 100, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:cut])
        refused("damaged")
    path.write_bytes(whole)
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(whole)
    refused("one of several files", part)
    other = tmp_path / "other.gguf"
    write(other, "unheard")
    refused("no architecture", other)
    failed(rankwise("evaluate", other, "--text", "bundled"), "no architecture", str(other))
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("gguf package", path, MissingPackageError)
