"""Text sources and sequences."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rankwise.data import choose, load_sequences, parse_source, python_text, spread_first, windows
from rankwise.data.named import NAMED_TEXTS
from rankwise.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from rankwise.quickstart import MODEL

    return AutoTokenizer.from_pretrained(MODEL)


def test_every_local_form_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = ["first document", "second, with ünïcode"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": d}) + "\n\n" for d in documents))
    pyarrow.parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(documents[1])
    assert list(parse_source(f"jsonl:{tmp_path}/a.jsonl#body").documents()) == documents
    assert list(parse_source(f"parquet:{tmp_path}/a.parquet#body").documents()) == documents
    assert list(parse_source(f"text:{tmp_path}/a.txt").documents()) == documents[1:]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("txt:a", "did you mean 'text'"),
        ("text:", "names nothing"),
        ("jsonl:a.jsonl", "which field"),
        ("parquet:a#", "which field"),
        ("bundled:tset", "no split"),
    ],
)
def test_sources_outside_the_grammar_say_how_to_write_them(source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_source(source)


def test_a_bare_path_is_told_the_form_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(DataError, match=f"text:{tmp_path}/a"):
        parse_source(f"{tmp_path}/a")


def test_bad_files_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"other": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{oops\n')
    (tmp_path / "c.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "d.parquet").write_bytes(b"not parquet")
    for source, says in (
        (f"jsonl:{tmp_path}/a.jsonl#text", "line 2"),
        (f"jsonl:{tmp_path}/b.jsonl#text", "line 2"),
        (f"text:{tmp_path}/c.txt", "byte 3"),
        (f"parquet:{tmp_path}/d.parquet#text", "not parquet"),
        (f"text:{tmp_path}/missing.txt", "no such file"),
    ):
        with pytest.raises(DataError, match=says):
            list(parse_source(source).documents())


def test_token_files_are_checked(tmp_path: Path) -> None:
    ids = torch.arange(24, dtype=torch.int32).view(4, 6)
    save_file({"ids": ids}, tmp_path / "good.safetensors")
    save_file({"ids": ids.float()}, tmp_path / "floats.safetensors")
    save_file({"a": ids, "b": ids + 1}, tmp_path / "two.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    good = parse_source(f"tokens:{tmp_path}/good.safetensors")
    assert torch.equal(windows(good, None, 100, None)[0], ids.long())
    assert windows(good, None, 100, 5)[0].shape == (4, 5)
    for name, says in (("floats", "integer"), ("two", "2 tensors"), ("bad", "damaged")):
        with pytest.raises(DataError, match=says):
            parse_source(f"tokens:{tmp_path}/{name}.safetensors").token_ids()
    with pytest.raises(DataError, match="outside the model's vocabulary of 20"):
        windows(good, None, 20, None)


def test_packing_keeps_every_token_and_separates_documents(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "one two three"}\n{"t": "  "}\n{"t": "four five six"}\n')
    read = load_sequences(parse_source(f"jsonl:{tmp_path}/a.jsonl#t"), tokenizer, 2048, length=2, count=None, seed=None)
    one, two = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("one two three", "four five six"))
    stream = [*one, tokenizer.eos_token_id, *two]
    assert read.ids.flatten().tolist() == stream[: len(stream) // 2 * 2]


def test_long_texts_are_tokenized_in_pieces_that_show_no_seam(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr("rankwise.data.sequences._CHUNK_CHARACTERS", 100)
    ids = windows(parse_source(f"text:{tmp_path}/a.txt"), tokenizer, 2048, 1)[0].flatten().tolist()
    assert tokenizer.decode(ids) == text


def test_too_little_text_says_how_much_there_is(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "short.txt").write_text("three short words")
    with pytest.raises(DataError, match="holds no text"):
        windows(parse_source(f"text:{tmp_path}/empty.txt"), tokenizer, 2048, 8)
    with pytest.raises(DataError, match=r"has \d tokens, fewer than one sequence of 64"):
        windows(parse_source(f"text:{tmp_path}/short.txt"), tokenizer, 2048, 64)
    with pytest.raises(DataError, match="no tokenizer"):
        windows(parse_source(f"text:{tmp_path}/short.txt"), None, 2048, 8)


def test_choosing_is_seeded_ordered_and_without_replacement() -> None:
    ids = torch.arange(50)[:, None]
    assert torch.equal(choose(ids, 5, None), ids[:5])
    assert torch.equal(choose(ids, 5, None, first=7), ids[7:12])
    drawn = choose(ids, 20, 3)
    assert torch.equal(drawn, choose(ids, 20, 3))
    assert not torch.equal(drawn, choose(ids, 20, 4))
    assert torch.equal(drawn.flatten().sort().values, drawn.flatten())
    assert len(drawn.unique()) == 20


@given(st.integers(1, 40), st.integers(0, 40))
def test_some_that_lie_evenly_over_all_come_first(count: int, wanted: int) -> None:
    wanted = min(wanted, count)
    found = spread_first(torch.arange(count)[:, None].expand(-1, 3), wanted)[:, 0].tolist()
    assert sorted(found) == list(range(count))
    assert found[:wanted] == [number * count // wanted for number in range(wanted)]
    assert found[wanted:] == sorted(found[wanted:])


def test_without_a_network_a_hub_source_names_the_local_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    def refuses(*_arguments: Any, **_options: Any) -> Any:
        raise ConnectionError("no route to host")

    fake = ModuleType("datasets")
    fake.load_dataset = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError, match=r"no route to host(.|\n)*text:PATH, jsonl:PATH#field"):
        list(parse_source("hub:some/name:train#text").documents())


@pytest.mark.long
def test_the_bundled_splits_share_no_document() -> None:
    train, held_out = (set(python_text.documents(split)) for split in python_text.SPLITS)
    assert not train & held_out
    assert sum(map(len, held_out)) > 50_000
    with pytest.raises(ValueError, match="split"):
        next(python_text.documents("test"))


@pytest.mark.parametrize(("name", "joint", "count"), [("wikitext2", "\n\n", 3), ("ptb", " ", 3), ("c4", " ", 1100)])
def test_named_texts_are_joined_as_their_papers_do(
    name: str, joint: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file at which revision is asked for, and the one document that its rows become."""
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    entry = NAMED_TEXTS[name]
    rows = [f"row {i}" for i in range(1200 if name == "c4" else 3)]
    path = tmp_path / Path(entry.file).name
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"text": row, "url": "u"}) + "\n" for row in rows)
    else:
        pyarrow.parquet.write_table(pyarrow.table({entry.field: rows}), path)
    asked: list[Any] = []

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in (name, f"named:{name}"):
        assert list(parse_source(source).documents()) == [joint.join(rows[:count])]
    assert asked[0] == (entry.repository, entry.file, {"repo_type": "dataset", "revision": entry.revision})


def test_a_named_text_without_a_network_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"(?s)ptb cannot be had.*no route.*text:FILE"):
        list(parse_source("ptb").documents())
