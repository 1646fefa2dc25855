"""A checkpoint's model without its weights: shapes and types alone, at once for a model of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoints.auto import auto_class
from rankwise.checkpoints.compressed import fetched, is_compressed, require_known_format
from rankwise.checkpoints.load import read_config
from rankwise.checkpoints.modeling_file import compressed_class
from rankwise.checkpoints.verify import read_json


def empty_model(source: str, trust_remote_code: bool = False) -> Any:
    """The causal language model of a directory or hub name, dense or compressed, on the meta device.

    Args:
        source: directory or hub name; its config is all that is read.
        trust_remote_code: run code that it ships.

    Raises:
        ModelError: when there is no config, or it is of no known architecture.
    """
    source = fetched(source, weights=False)
    if is_compressed(source):
        require_known_format(source)
        kind = compressed_class(read_json(Path(source) / "config.json"), source)
        config = kind.config_class.from_pretrained(source)
        with torch.device("meta"):
            return kind._from_config(config)
    config = read_config(source, trust_remote_code)
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
