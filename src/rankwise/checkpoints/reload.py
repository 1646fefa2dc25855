"""A written checkpoint is loaded again where rankwise is not installed, and compared with the model in memory."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.checkpoints import reload_elsewhere
from rankwise.checkpoints.image_probe import image_inputs
from rankwise.checkpoints.modeling_file import auto_names, base_classes
from rankwise.errors import ModelError

PROBE = 64
"""Most tokens that the models are compared on."""

_ROUNDING = 64
"""Units of rounding, of the largest logit, by which logits may differ; on one machine they do not differ at all."""


class _Elsewhere:
    """The process of `reload_elsewhere.py`, started at the first request and kept for the next."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", reload_elsewhere.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # ^C stops this process alone; the other one ends when its standard input does.
            start_new_session=True,
        )
        atexit.register(self.stop)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> int:
        """Serve one request; its exit status, negative for a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return int(json.loads(line)["status"]) if line else -int(signal.SIGKILL)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def _started(attempt: int) -> _Elsewhere:
    return _Elsewhere()


def _elsewhere(attempt: int = 0) -> _Elsewhere:
    found = _started(attempt)
    return found if found.runs else _elsewhere(attempt + 1)


def expect_reload() -> None:
    """Start the process that `check_reload` asks, which imports for some seconds before it can answer."""
    _elsewhere()


@torch.inference_mode()
def check_reload(folder: Path, model: Any, ids: Tensor, trust_remote_code: bool) -> bool:
    """Load a checkpoint in a process without rankwise and compare it with the model it was written from.

    Every parameter and buffer has to be the same to the bit, those that are computed when a model is built among them,
    and the logits the same up to rounding. A model that reads images is loaded by the class for it, and tried on text
    and, where a random one can be made from its config, on an image.

    Args:
        folder: the checkpoint.
        model: as it was saved, in the dtypes it is stored in.
        ids: a probe, shape `[1, tokens]`; the first `PROBE` tokens are used.
        trust_remote_code: whether loading it runs code that lies in the folder.

    Returns:
        Whether it was tried on an image too.

    Raises:
        ModelError: saying what differs.
    """
    files: dict[str, str] = {}
    probes: dict[str, dict[str, Tensor]] = {"text": {"input_ids": ids[:1, :PROBE].to(model.device)}}
    if image := image_inputs(model, ids):
        probes["image"] = image
    here = reload_elsewhere.digests(model)
    classes = base_classes(model)
    with tempfile.TemporaryDirectory(prefix="rankwise-reload-") as name:
        answer = Path(name)
        request = {
            "folder": str(folder),
            "class": auto_names(classes[0], classes[2])[0],
            "probes": files,
            "trust": trust_remote_code,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "answer": name,
            "modules": [each.__module__ for each in classes if each.__module__.startswith("transformers.")],
        }
        for probe, given in probes.items():
            files[probe] = f"{probe}-given.safetensors"
            save_file({k: v.cpu().contiguous() for k, v in given.items()}, answer / files[probe])
        status = _elsewhere().ask(request)
        if status:
            raise _differs(model, *_reason(status, answer / "error.txt"))
        there = json.loads((answer / "tensors.json").read_text())
        found = load_file(answer / "logits.safetensors")
    for tensor in sorted(here.keys() | there.keys()):
        if here.get(tensor) != there.get(tensor):
            raise _differs(model, f"has another {tensor} when it is loaded again", tensor)
    for probe, given in probes.items():
        logits = model(**given, use_cache=False).logits
        allowed = _ROUNDING * torch.finfo(logits.dtype).eps * float(logits.float().abs().max())
        difference = float((logits.float().cpu() - found[probe].float()).abs().max())
        if not difference <= allowed:
            what = "gives other logits" if probe == "text" else "gives other logits of an image"
            raise _differs(model, f"{what} when it is loaded again (by {difference:.3g})", str(folder))
    return "image" in probes


def _reason(status: int, error: Path) -> tuple[str, str]:
    """What went wrong in the other process, and where."""
    if status < 0:
        return f"cannot be loaded again: the process that tried was stopped by {signal.Signals(-status).name}", (
            "too little memory for a second copy of the compressed model?"
        )
    lines = error.read_text().strip().splitlines() if error.exists() else ["no reason given"]
    frames = [line.strip() for line in lines if line.startswith("  File ")]
    return f"cannot be loaded again ({lines[-1][:300]})", frames[-1] if frames else "loading"


def _differs(model: Any, what: str, where: str) -> ModelError:
    return ModelError(
        f"The checkpoint of this {type(model).__name__} {what}; it is not kept.",
        where=where,
        remedy="this architecture is not written right: please report it with the config; finished stages are kept",
    )
