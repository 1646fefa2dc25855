"""The card of a checkpoint: ready to pass on, with licence and base model, and without paths of who made it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Run
from rankwise import checkpoints, compress
from rankwise.checkpoints import front_matter
from rankwise.checkpoints import origin as where
from rankwise.recipes import recipe_from
from rankwise.reports.model_card import without_folders

Values = Callable[..., dict[str, Any]]


def keys_of(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_licence_and_base_model_go_along_and_paths_do_not(
    tiny: Path, settings: Values, rankwise: Run, tmp_path: Path, text: Path
) -> None:
    (tiny / "README.md").write_text(
        "---\nlicense: other\nlicense_name: odd-1.0\nlanguage: [en, de]\nbase_model: someone/base\nwidget: 3\n---\n"
    )
    (tiny / "LICENSE").write_text("Do as you like.\n")
    out = tmp_path / "small one"
    compress(recipe_from(settings(output=str(out), method="svd", budget={"keep": 0.6})), run_directory=tmp_path / "run")
    card = (out / "README.md").read_text()
    assert keys_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rankwise", "low-rank"],
        "license": "other",
        "license_name": "odd-1.0",
        "language": ["en", "de"],
        "base_model": "someone/base",
    }
    assert (out / "LICENSE").read_text() == "Do as you like.\n"
    assert str(tmp_path) not in card
    assert f"`text:{text.name}`" in card
    assert 'from_pretrained("small one", trust_remote_code=True)' in card
    assert "hf upload USER/small-one ." in card
    # What is trained afterwards passes them on, and is called by its own name.
    words = ("-o", tmp_path / "tuned", "--data", f"text:{text}", "--length", "32", "--held-out", "2")
    status, _, error = rankwise("finetune", out, *words, "--set", "epochs=1")
    assert status == 0, error
    tuned = (tmp_path / "tuned/README.md").read_text()
    assert keys_of(tuned)["license_name"] == "odd-1.0"
    assert 'from_pretrained("tuned"' in tuned
    assert str(tmp_path) not in tuned
    assert (tmp_path / "tuned/LICENSE").exists()


@pytest.mark.parametrize(
    "card",
    [
        "no front matter\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: 3}\nlanguage: [1]\nbase_model: '../../etc'\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\nlicense: never closed\n",
    ],
)
def test_a_card_that_says_nothing_of_use_adds_nothing(card: str, tmp_path: Path) -> None:
    assert front_matter(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text(card)
    assert front_matter(str(tmp_path)) == {}


def test_a_hub_name_is_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_of_card", lambda source: {"license": "mit", "base_model": "another/older"})
    found = checkpoints.front_matter("someone/model")
    assert found == {"license": "mit", "base_model": "someone/model"}
    monkeypatch.setattr(where, "_of_card", lambda source: {"base_model": ["one/a", "two/b"]})
    assert checkpoints.front_matter("/")["base_model"] == ["one/a", "two/b"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("text:/home/me/data/x.txt", "text:x.txt"),
        ("jsonl:/a/b.jsonl#text", "jsonl:b.jsonl#text"),
        ("/a/b/mine.py:Own", "mine.py:Own"),
        ("~/x/y.txt", "y.txt"),
        ("org/model and 3/4 of it", "org/model and 3/4 of it"),
        ("kept in /root/.cache/run, for now", "kept in run, for now"),
        ("hub:org/name/config:train#text", "hub:org/name/config:train#text"),
    ],
)
def test_paths_from_the_root_on_are_their_last_part(text: str, shown: str) -> None:
    assert without_folders(text) == shown
