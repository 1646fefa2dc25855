"""The README.md of a compressed checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rankwise.reports.escaping import in_code, in_markdown
from rankwise.reports.parts import in_words
from rankwise.reports.report import Report

_CARD = """\
---
{{ front }}---

# {{ name | text }}, {% if bits %}{{ "%.3g" | format(bits.got) }} bits a linear weight\
{% else %}{{ "%.3g" | format(100 * keep.got) }}% of the linear weights kept{% endif %}

Made by rankwise {{ machine.rankwise | text }} from {{ name | code }} ({{ architecture | code }}).

| | before | after |
|---|---|---|
| parameters, whole model | {{ "{:,}".format(before.parameters) }} | {{ "{:,}".format(after.parameters) }} |
| parameters, decoder linears | {{ "{:,}".format(before.linear_parameters) }} | \
{{ "{:,}".format(after.linear_parameters) }} |
| bytes of weights | {{ "{:,}".format(before.bytes) }} | {{ "{:,}".format(after.bytes) }} |
{%- if evaluation %}
| perplexity, {{ evaluation.source | place | text }} ({{ "{:,}".format(evaluation.dense.tokens) }} tokens, windows of \
{{ evaluation.dense.length }}) | {{ "%.3f" | format(evaluation.dense.perplexity) }} | \
{{ "%.3f" | format(evaluation.compressed.perplexity) }} |
{%- endif %}

- method {{ recipe.method.name | place | code }}, allocation {{ recipe.allocation.name | place | code }}, \
{% if bits %}{% if bits.asked is not none %}asked for {{ bits.asked }} bits a weight, got {% endif %}\
{{ "%.4f" | format(bits.got) }}{% if bits.asked is none %} bits a weight{% endif %}{% else %}\
{% if keep.asked is not none %}asked to keep {{ keep.asked }}, {% endif %}\
kept {{ "%.4f" | format(keep.got) }}{% endif %}
- calibration: {{ calibration.sequences }} sequences of {{ calibration.length }} tokens from \
{{ calibration.source | place | code }}\
{% if calibration.gradient_sequences is not none %}, gradients at {{ calibration.gradient_sequences }} of them\
{% endif %}{% if calibration.bos is not none %}, each begun by the start token{% endif %}
- {{ counted | text }}
{%- if biases_added %}
- {{ "{:,}".format(biases_added) }} biases were added to make up for the mean of what was dropped
{%- endif %}
{%- for step in repair %}
- repair {{ step.step | code }}: objective on validation samples {{ step.objective_before | in_words(".4g") }} before, \
{{ step.objective_after | in_words(".4g") }} after{% if not step.accepted %}; undone{% endif %}
{%- endfor %}
{%- for step in finetune %}
- fine-tuned with {{ step.settings.method | code }} on {{ step.examples.count }} examples of \
{{ step.settings.data | place | code }}: \
loss a token on {{ step.examples.held_out }} held out {{ step.loss_before | in_words(".4f") }} before, \
{{ step.loss_after | in_words(".4f") }} after{% if not step.accepted %}; undone{% endif %}
{%- endfor %}
{%- for note in notes %}
- {{ note | place | text }}
{%- endfor %}
{%- if verdict %}

## What was lost

{{ verdict.lost | text }}
{%- if verdict.next %}

What to try next, in this order:
{% for each in verdict.next %}
{{ loop.index }}. {{ each.what | text }}: {{ each.cost | text }}
{%- endfor %}
{%- endif %}
{%- endif %}

## Use

```python
from transformers import {{ model_class }}, {{ reader_class }}

model = {{ model_class }}.from_pretrained({{ directory }}{% if low_rank %}, trust_remote_code=True{% endif %})
{{ reader }} = {{ reader_class }}.from_pretrained({{ directory }}{% if low_rank %}, trust_remote_code=True{% endif %})
```
{% if low_rank %}
`trust_remote_code=True` runs `modeling_rankwise.py` from this directory: the new layers and three small subclasses
of the original classes. Without it loading stops with an error. The {{ reader }} is the original's; transformers reads
the model's config for it all the same, and would ask otherwise.
{%- if coded %} On a CPU
weights are decoded once and kept, as large as the original, where memory allows, and else in every forward pass;
`from_pretrained(..., rankwise_cache_dense=True)` or `False` says which.{% endif %}
{% elif smaller %}
It is a plain checkpoint of the original's architecture with smaller weights, and needs no code of its own.
{% else %}
The weights are multiplied back: this checkpoint loads like the original and is as large as it. No size is saved.
{% endif %}
`rankwise_report.json` has every rank, size, time and setting; `plan.json` what was decided of each weight. To share
them, `hf upload USER/{{ upload }} .` in this directory; what is loaded is then `"USER/{{ upload }}"`.
"""

_FOLDERS = re.compile(r"(?<![\w.])~?/(?:[^\s/:;,'\"]+/)*(?=[^\s/])")
"""Of a path from the root on, the folders before its last part."""


def without_folders(text: object) -> str:
    """Text in which a path of the machine is its last part."""
    return _FOLDERS.sub("", str(text))


def model_card(
    report: Report,
    plain: bool | None = None,
    sees: bool = False,
    front: Mapping[str, Any] | None = None,
    directory: str = "DIR",
) -> str:
    """Markdown for a report, without paths of the machine that made it.

    Args:
        report: of the checkpoint.
        plain: whether it needs no code of its own; by default what the recipe's format says.
        sees: whether the model reads images too.
        front: keys that the card of the original says of itself.
        directory: name of the directory that holds it.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"in_words": in_words, "text": in_markdown, "code": in_code, "place": without_folders}
    name = report.recipe.model.rstrip("/").rpartition("/")[2]
    low_rank = report.recipe.format == "low_rank" if plain is None else not plain
    smaller = report.after.parameters < report.before.parameters
    keys = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["rankwise", "quantized" if report.coded else "low-rank"],
        **(front or {}),
    }
    if report.coded and "base_model" in keys:
        keys["base_model_relation"] = "quantized"
    return environment.from_string(_CARD).render(
        **dict(report),
        name=name,
        front=yaml.safe_dump(keys, sort_keys=False, allow_unicode=True),
        directory=json.dumps(directory, ensure_ascii=False),
        upload=re.sub(r"[^\w.-]+", "-", directory),
        low_rank=low_rank,
        smaller=smaller,
        sees=sees,
        model_class="AutoModelForImageTextToText" if sees else "AutoModelForCausalLM",
        reader_class="AutoProcessor" if sees else "AutoTokenizer",
        reader="processor" if sees else "tokenizer",
    )
