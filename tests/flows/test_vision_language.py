"""Vision-language models: the decoder of their language model is compressed on text, the rest stays to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from conftest import Run, failed
from rankwise import compress
from rankwise.checkpoints import empty_model, load_model
from rankwise.checkpoints.image_probe import image_inputs
from rankwise.errors import ModelError
from rankwise.evaluation import count_operations
from rankwise.flows.finetune import finetune
from rankwise.quickstart import MODEL
from rankwise.recipes import FineTune, recipe_from
from rankwise.stages import finish
from rankwise.stages.memory import needs, shapes_of
from vision_models import FAMILIES, IMAGE, llava_processor, save_seeing

FIRST = ("llava", "gemma3", "qwen2_5_vl", "mistral3")
"""Families that are always tried; the others with the long tests."""

IDS = torch.arange(3, 27)[None]

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def values(tmp_path: Path) -> Values:
    """A recipe for a model in `seeing`."""
    ids = torch.randint(200, 2000, (24, 16), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "model": str(tmp_path / "seeing"),
            "output": str(tmp_path / "small"),
            "method": "svd",
            "allocation": "uniform",
            "budget": {"keep": 0.6, "rank_multiple": 1},
            "calibration": {"source": f"tokens:{tmp_path / 'ids.safetensors'}", "sequences": 16},
            **changes,
        }

    return make


@torch.no_grad()
def logits(model: Any, given: Any = None) -> torch.Tensor:
    return model(**({"input_ids": IDS} if given is None else given), use_cache=False).logits


def generated(model: Any, given: Any) -> torch.Tensor:
    return model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize(
    "kind", [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.long) for kind in FAMILIES]
)
def test_the_decoder_is_compressed_and_the_rest_stays(kind: str, values: Values, tmp_path: Path) -> None:
    source = load_file(save_seeing(tmp_path / "seeing", kind, torch.bfloat16) / "model.safetensors")
    small = compress(recipe_from(values(method="two_sided")))
    before = load_model(str(tmp_path / "seeing"), precision="stored").model
    path = next(name for name, module in before.named_modules() if module is before.get_decoder())
    assert all(name.startswith(f"{path}.layers.") for name in small.plan.cuts)
    assert all(site.rank for site in small.report.sites.values())

    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", trust_remote_code=True, dtype="auto").eval()
    kept = dict(again.named_parameters())
    # A method may change a bias, and experts are taken apart.
    rest = {n: p for n, p in before.named_parameters() if n.rpartition(".")[0] not in small.plan.cuts}
    rest = {name: p for name, p in rest.items() if "experts" not in name}
    assert len(rest) > 10
    assert all(torch.equal(kept[name], p) and kept[name].dtype == p.dtype for name, p in rest.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in source.values())

    image = image_inputs(small.model, IDS)
    assert IMAGE in image["input_ids"]
    ours = load_model(str(tmp_path / "small"), precision="stored").model
    for given in ({"input_ids": IDS}, image):
        for model in (again, ours):
            assert torch.equal(logits(model, given), logits(small.model, given))
            assert torch.equal(generated(model, given), generated(small.model, given))
        assert not torch.equal(logits(small.model, given), logits(before, given))
    linear = sum(m * n for m, n in small.plan.shapes.values())
    total = sum(p.numel() for p in before.parameters())
    assert any(f"{linear:,} of its {total:,} parameters" in note for note in small.report.notes)
    assert not any("text alone: no image" in note for note in small.report.notes)


def test_a_plain_checkpoint_is_of_the_same_class(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "gemma3")
    small = compress(recipe_from(values(format="dense", method={"name": "bolaco", "bias": False})))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert type(again).__name__ == "Gemma3ForConditionalGeneration"
    assert json.loads((tmp_path / "small/config.json").read_text())["model_type"] == "gemma3"
    image = image_inputs(small.model, IDS)
    assert torch.equal(logits(again), logits(small.model))
    assert torch.equal(logits(again, image), logits(small.model, image))
    assert set(load_file(tmp_path / "small/model.safetensors")) == set(load_file(tmp_path / "seeing/model.safetensors"))


def test_a_bias_that_is_added_to_a_plain_checkpoint_is_said_in_the_config_inside(
    values: Values, tmp_path: Path
) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    small = compress(recipe_from(values(format="dense", method="bolaco")))
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["text_config"]["attention_bias"]
    assert "attention_bias" not in config
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "small")), logits(small.model))


def test_codes_of_four_bits(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "qwen2_5_vl", torch.bfloat16)
    given = values(method="quantize", budget={"bits": 4})
    del given["allocation"]
    small = compress(recipe_from(given))
    assert small.report.bits is not None
    assert small.report.bits.got <= 4
    again = load_model(str(tmp_path / "small"), precision="stored").model
    image = image_inputs(small.model, IDS)
    assert torch.equal(logits(again), logits(small.model))
    assert torch.equal(logits(again, image), logits(small.model, image))


@pytest.mark.parametrize("memory", [pytest.param("blocks", marks=pytest.mark.long), "disk"])
def test_any_way_to_hold_it_gives_the_same(memory: str, values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "qwen2_5_vl", torch.bfloat16)
    found = []
    for mode in ("whole", memory):
        small = compress(recipe_from(values(method="two_sided", memory=mode)), run_directory=tmp_path / mode)
        found.append(((tmp_path / "small/model.safetensors").read_bytes(), small.plan))
    assert found[0] == found[1]


@pytest.mark.long
def test_every_repair_and_fine_tuning(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "gemma3")
    llava_processor().image_processor.save_pretrained(tmp_path / "seeing")
    repair = {"steps": "refit,blocks,factors", "blocks": {"epochs": 1}, "factors": {"epochs": 1}}
    small = compress(recipe_from(values(repair=repair, validation={"sequences": 8})))
    assert [step.step for step in small.report.repair] == ["refit", "blocks", "factors"]
    data = values()["calibration"]["source"]
    report = finetune(FineTune(model=str(tmp_path / "small"), data=data, output=str(tmp_path / "tuned"), held_out=4))
    assert report.finetune[0].trained_parameters > 0
    tuned = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert type(tuned).__name__ == "RankwiseGemma3ForConditionalGeneration"
    assert (tmp_path / "tuned/preprocessor_config.json").exists()


@pytest.mark.parametrize("method", ["flap", "llm_pruner", "pruned", "slicegpt"])
def test_methods_that_change_widths_are_refused_by_name(method: str, values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    given = values(method=method)
    del given["allocation"]
    with pytest.raises(ModelError, match=f"{method} gives the decoder other widths"):
        compress(recipe_from(given))
    assert not (tmp_path / "small").exists()


def image_of(processor: Any) -> Any:
    from PIL import Image

    picture = Image.new("RGB", (20, 24), (200, 30, 90))
    return processor(text=f"the {processor.image_token} list", images=picture, return_tensors="pt")


@pytest.mark.parametrize("format", ["low_rank", "dense"])
def test_the_processor_goes_along(format: str, values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    llava_processor().save_pretrained(tmp_path / "seeing")
    small = compress(recipe_from(values(format=format)))
    assert small.tokenizer is not None
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "seeing" / name).read_bytes()
    before, after = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("seeing", "small"))
    assert type(after) is type(before)
    assert after.chat_template == before.chat_template
    expected, found = image_of(before), image_of(after)
    assert expected.keys() == found.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.equal(logits(again, found), logits(small.model, found))
    assert torch.equal(generated(again, found), generated(small.model, found))
    assert "AutoModelForImageTextToText" in (tmp_path / "small/README.md").read_text()


def test_a_processor_of_older_files_that_name_no_class(values: Values, tmp_path: Path) -> None:
    """The class is found by the original's model type, which the checkpoint does not have."""
    save_seeing(tmp_path / "seeing", "llava")
    processor = llava_processor()
    processor.image_processor.save_pretrained(tmp_path / "seeing")
    processor.tokenizer.save_pretrained(tmp_path / "seeing", save_jinja_files=False)
    (tmp_path / "seeing/chat_template.json").write_text(json.dumps({"chat_template": "of old {{ messages }}"}))
    before = AutoProcessor.from_pretrained(tmp_path / "seeing")
    compress(recipe_from(values()))
    after = AutoProcessor.from_pretrained(tmp_path / "small")
    assert type(after) is type(before)
    assert type(after).__name__ == "LlavaProcessor"
    assert after.chat_template == before.chat_template == "of old {{ messages }}"
    assert after.tokenizer.chat_template == before.tokenizer.chat_template == "of the tokenizer {{ messages }}"
    name = "preprocessor_config.json"
    assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "seeing" / name).read_bytes()


def test_a_source_without_a_processor_is_fine_and_said(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "seeing")
    small = compress(recipe_from(values()))
    assert any("holds no processor" in note for note in small.report.notes)
    assert not [file for file in (tmp_path / "small").iterdir() if "processor" in file.name]


def test_a_processor_that_cannot_be_read_is_refused_before_anything_is_computed(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    (tmp_path / "seeing/preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ModelError, match=r"not JSON(.|\n)*preprocessor_config.json"):
        compress(recipe_from(values()), run_directory=tmp_path / "run")
    assert not list((tmp_path / "run").glob("statistics*"))


def test_missing_tensors_of_the_vision_tower_are_refused(values: Values, tmp_path: Path) -> None:
    path = save_seeing(tmp_path / "seeing", "llava") / "model.safetensors"
    tensors = load_file(path)
    lacking = {name for name in tensors if "vision" in name and ".layers.1." in name}
    assert lacking
    save_file({name: each for name, each in tensors.items() if name not in lacking}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lack {len(lacking)} tensors of the model, .*vision.*layers.1"):
        load_model(str(tmp_path / "seeing"))


def test_a_checkpoint_that_sees_otherwise_is_never_there(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor and the logits of text are the same; an image alone tells."""
    save_seeing(tmp_path / "seeing", "llava")
    real = finish.save_low_rank

    def save(folder: Path, *rest: Any) -> None:
        real(folder, *rest)
        config = json.loads((folder / "config.json").read_text())
        assert config["projector_hidden_act"] == "gelu"
        (folder / "config.json").write_text(json.dumps({**config, "projector_hidden_act": "relu"}))

    monkeypatch.setattr(finish, "save_low_rank", save)
    with pytest.raises(ModelError, match="other logits of an image"):
        compress(recipe_from(values()))
    assert not (tmp_path / "small").exists()


def test_operations_are_those_of_text_and_memory_is_told(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    model = empty_model(str(tmp_path / "seeing"))
    counted = count_operations(model, torch.float32, tokens=1)
    decoder = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    attention = 2 * 4 * 16
    assert counted.macs == decoder + head + attention
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.linear_parameters == decoder
    assert counted.context == 128
    shapes = shapes_of(recipe_from(values()))
    assert {site.name.partition(".layers.")[0] for site in shapes.sites} == {"model.language_model"}
    assert all(need.host > 0 for need in needs(shapes).values())


def test_commands_read_it_back(values: Values, tmp_path: Path, rankwise: Run, text: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    llava_processor().save_pretrained(tmp_path / "seeing")
    compress(recipe_from(values()))
    for model in ("seeing", "small"):
        status, out, err = rankwise("evaluate", tmp_path / model, "--text", f"text:{text}", "--length", "32", "--json")
        assert status == 0, err
        assert json.loads(out)["perplexity"] > 1
    status, out, err = rankwise("generate", tmp_path / "small", "--prompt", "the list", "--new-tokens", "4")
    assert status == 0, err
    assert out.strip()
    status, out, err = rankwise("cost", tmp_path / "small", "--json")
    assert status == 0, err
    (counted,) = json.loads(out).values()
    assert counted["linear_parameters"] < 18_432
    status, _, err = rankwise("plan-memory", tmp_path / "seeing", "--sequences", "16")
    assert status == 0, err
    failed(
        rankwise("compress", tmp_path / "small", "--calibration", f"text:{text}", "--output", tmp_path / "x"),
        "compressed already",
    )


ELSEWHERE = """
import sys
sys.modules["rankwise"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, again, expected = sys.argv[1:]
given, wanted = torch.load(expected, weights_only=True)
load = AutoModelForImageTextToText.from_pretrained
model, info = load(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
model.save_pretrained(again)
reloaded = load(again, trust_remote_code=True, dtype="auto")
for each in (model, reloaded):
    with torch.no_grad():
        assert torch.equal(each(**given).logits, wanted), "logits differ"
assert "Rankwise" in type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "LlavaProcessor"
try:
    load(folder, trust_remote_code=False)
except ValueError as problem:
    assert "trust_remote_code" in str(problem)
else:
    raise AssertionError("loaded without trust")
print("fine")
"""


@pytest.mark.long
def test_it_loads_where_rankwise_is_not_installed(values: Values, tmp_path: Path) -> None:
    save_seeing(tmp_path / "seeing", "llava")
    llava_processor().save_pretrained(tmp_path / "seeing")
    small = compress(recipe_from(values(method="two_sided")))
    image = image_inputs(small.model, IDS)
    torch.save((image, logits(small.model, image)), tmp_path / "expected.pt")
    arguments = [tmp_path / "small", tmp_path / "again", tmp_path / "expected.pt"]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
