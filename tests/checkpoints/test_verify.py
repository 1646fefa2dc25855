"""Headers, indexes and configs are read strictly: what does not describe the files beside it is named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from conftest import ROOT
from rankwise.checkpoints import load_model
from rankwise.checkpoints.verify import read_config, read_header, read_index, tensor_names, verify_checkpoint
from rankwise.errors import ModelError
from rankwise.layers.narrow import LLAMA_FORM

OLD = ROOT / "tests" / "fixtures" / "written-by-0.1.0"

STREAM: dict[str, Any] = {
    "width": 8,
    "kept": 4,
    "eps": 1e-5,
    "blocks": "layers",
    "readers": [["self_attn.q_proj"], ["mlp.up_proj"]],
    "writers": ["self_attn.o_proj", "mlp.down_proj"],
    "adapters": [[[4, 4], [4, 4]], [[4, 4], [8, 4]]],
}
"""How a stream of 8 was cut to 4, as a config says it."""


def written(folder: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "file", sorted(OLD.glob("*/*.safetensors")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_headers_of_real_files_are_read(file: Path) -> None:
    assert tensor_names(file)


def test_every_type_that_torch_writes_is_known(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
    tensors = {str(kind): torch.zeros(3, 2, dtype=kind) for kind in kinds} | {"empty": torch.ones(0, 4)}
    (tmp_path / "w.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    assert set(read_header(tmp_path / "w.safetensors")) == set(tensors)


@pytest.mark.parametrize(
    ("header", "body", "length", "says"),
    [
        (entry(), b"1234567", None, "does not fit its header"),
        (entry(), b"12345678", 2**63, "does not fit its header"),
        (entry(offsets=(0, 4)), b"1234", None, "tensor 'a' does not lie where"),
        (entry(offsets=(4, 12)), b"1" * 12, None, "tensor 'a' does not lie where"),
        (entry(dtype="F31"), b"12345678", None, "does not describe tensor 'a'"),
        (entry(dtype=["F32"]), b"12345678", None, "does not describe tensor 'a'"),
        (entry(shape=[-2]), b"12345678", None, "does not describe tensor 'a'"),
        (entry(shape=[True]), b"12345678", None, "does not describe tensor 'a'"),
        (entry(shape="2"), b"12345678", None, "does not describe tensor 'a'"),
        (entry(offsets=[8]), b"12345678", None, "does not describe tensor 'a'"),
        (entry(offsets=[8, 0]), b"12345678", None, "does not describe tensor 'a'"),
        (entry(offsets=[0, 2**70]), b"12345678", None, "does not describe tensor 'a'"),
        ({"a": None}, b"", None, "does not describe tensor 'a'"),
        ({"__metadata__": {"format": 3}}, b"", None, "notes are not text"),
        ([1], b"", None, "no JSON object"),
        (b"[" * 1000, b"", None, "not JSON"),
        (b"\xff\xff", b"", None, "not JSON"),
        (b"NaN", b"", None, "not JSON"),
    ],
)
def test_headers_that_do_not_describe_the_file_are_refused(
    header: Any, body: bytes, length: int | None, says: str, tmp_path: Path
) -> None:
    path = written(tmp_path, header, body, length)
    with pytest.raises(ModelError, match="truncated or damaged") as problem:
        tensor_names(path)
    assert says in str(problem.value)
    assert str(path) in str(problem.value)


def test_files_that_are_short_missing_or_no_files(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    for name, says in (("short", "damaged"), ("none", "missing"), (".", "cannot be read")):
        with pytest.raises(ModelError, match=says):
            tensor_names(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "places no tensor"),
        ({"weight_map": []}, "places no tensor"),
        ({"weight_map": {"a": 3}}, "no file beside it"),
        ({"weight_map": {"a": "../up.safetensors"}}, "no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file beside it"),
        ({"weight_map": {"a": "x" * 300}}, "no file beside it"),
        ({"weight_map": {"a": ""}}, "no file beside it"),
    ],
)
def test_an_index_places_tensors_in_files_beside_it(index: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=says):
        verify_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert read_index(tmp_path / "model.safetensors.index.json") == {"a": "one.safetensors"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": 3}, "'model_type' is no text"),
        ({"architectures": "LlamaForCausalLM"}, "'architectures' is no list"),
        ({"architectures": [None]}, "'architectures' is no list"),
        ({"auto_map": [1]}, "'auto_map' is no mapping"),
        ({"auto_map": {"AutoConfig": "nothing"}}, "'auto_map' is no mapping"),
        ({"auto_map": {"AutoConfig": "../a.B"}}, "'auto_map' is no mapping"),
        ({"auto_map": {"AutoConfig": {"a": 1}}}, "'auto_map' is no mapping"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, more than any model has"),
        ({"hidden_size": -(10**30)}, "'hidden_size'"),
        ({"rankwise": {"layers": [1]}}, "shape of each layer"),
        ({"rankwise": {"layers": {"a": 1}}}, "shape of each layer"),
        ({"rankwise": {"layers": {"a": {"shape": [1, 0]}}}}, "shape of each layer"),
        ({"rankwise": {"layers": {}, "blocks": [1]}}, "which sizes they have"),
        ({"rankwise": {"layers": {}, "blocks": {"layers.0": {"intermediate_size": "8"}}}}, "which sizes they have"),
        ({"rankwise": {"layers": {}, "blocks": {"layers.0": {"intermediate_size": -8}}}}, "which sizes they have"),
        ({"rankwise": {"layers": {}, "blocks": {"norm": {"intermediate_size": 8}}}}, "which sizes they have"),
        ({"rankwise": {"layers": {}, "stream": {"width": 8}}}, "residual stream was cut"),
        *(
            ({"rankwise": {"layers": {}, "stream": {**STREAM, **wrong}}}, "residual stream was cut")
            for wrong in (
                {"form": []},
                {"form": {"norms": ["ln_1"]}},
                {"form": {**LLAMA_FORM, "norms": []}},
                {"form": {**LLAMA_FORM, "mlp": [1]}},
                {"form": {**LLAMA_FORM, "padded": 1}},
                {"form": {**LLAMA_FORM, "parallel": True}},
            )
        ),
        ({"rankwise": {"layers": {}, "base_model_type": []}}, "base_model_type"),
        ({"rankwise": {"layers": {}, "format": "4"}}, "format '4', which is no number"),
    ],
)
def test_configs_that_loading_would_trip_over_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = json.loads((OLD / "source" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError) as problem:
        read_config(tmp_path)
    assert says in str(problem.value)


def test_a_cut_stream_is_said_with_a_form_or_without(tmp_path: Path) -> None:
    config = json.loads((OLD / "source" / "config.json").read_text())
    side_by_side = {"form": {**LLAMA_FORM, "parallel": True}, "adapters": [[[4, 4]], [[8, 4]]]}
    for more in ({}, {"form": LLAMA_FORM}, side_by_side):
        entry = {"rankwise": {"layers": {}, "stream": {**STREAM, **more}}}
        (tmp_path / "config.json").write_text(json.dumps(config | entry))
        assert read_config(tmp_path)["rankwise"] == entry["rankwise"]


@pytest.mark.parametrize("names", [{"AutoTokenizer": ["a.B", None]}, {"AutoConfig": "owner/name--a.B"}, {}, None])
def test_configs_as_people_publish_them_are_taken(names: Any, tmp_path: Path) -> None:
    config = json.loads((OLD / "source" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": names, "max_position_embeddings": 10**30}))
    assert read_config(tmp_path)["auto_map"] == names


@pytest.mark.parametrize("place", [-1, 0, 1000])
def test_outputs_that_have_no_place_of_their_own_each_are_named(place: int, tmp_path: Path) -> None:
    shutil.copytree(OLD / "pivoted", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.place"
    assert (tensors[name] == 0).sum() == 1
    tensors[name][tensors[name].argmax()] = place
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no place, or two to one") as problem:
        load_model(str(tmp_path / "model"))
    assert problem.value.where == name
