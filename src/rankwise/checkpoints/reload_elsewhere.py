"""A process that loads checkpoints where rankwise is not installed and says what it got. Run as a script, by path.

Reads one request a line from standard input, a JSON object with the keys `folder`, `class`, `probes`, `trust`,
`device`, `threads`, `answer` and `modules`, and answers each with a line `{"status"}` on standard output. Every request
is served by a fork, which has imported torch, transformers and the modules named but run nothing yet: a fresh process
without the seconds that importing takes. Probes are files under `answer` with the arguments of a forward pass. What it
got is there too: `tensors.json` with a hash by name of every parameter and buffer, and `logits.safetensors`, by probe;
or `error.txt`.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def digests(model: "torch.nn.Module") -> dict[str, str]:
    """Hash by name of every parameter and buffer, those that are not stored among them."""
    import torch

    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + values.data).hexdigest()
    return found


def serve(request: dict) -> None:
    """Load one checkpoint and write what it is under `answer`."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    answer = Path(request["answer"])
    torch.set_num_threads(request["threads"])
    load: Any = getattr(transformers, request["class"]).from_pretrained
    model, found = load(request["folder"], trust_remote_code=request["trust"], dtype="auto", output_loading_info=True)
    wrong = sorted(found["missing_keys"]) + sorted(found["unexpected_keys"])
    if wrong:
        raise RuntimeError(f"tensors that are missing or not expected, {wrong[0]} first")
    model = model.to(request["device"]).eval()
    for module in model.modules():
        if hasattr(module, "cache"):
            module.cache = False  # as the model in memory, which is to be compared
    (answer / "tensors.json").write_text(json.dumps(digests(model)))
    logits = {}
    with torch.inference_mode():
        for probe, file in request["probes"].items():
            given = load_file(answer / file, device=request["device"])
            logits[probe] = model(**given, use_cache=False).logits.cpu().contiguous()
    save_file(logits, answer / "logits.safetensors")


def fork(request: dict) -> int:
    """Serve a request in a child; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            serve(request)
            status = 0
        except BaseException:
            (Path(request["answer"]) / "error.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    sys.modules["rankwise"] = None  # type: ignore[assignment]  # importing it fails, as where it is not installed
    with tempfile.TemporaryDirectory(prefix="rankwise-reload-") as modules:
        os.environ.update(HF_MODULES_CACHE=modules, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        importlib.import_module("torch")
        importlib.import_module("transformers.models.auto.modeling_auto")

        for line in sys.stdin:
            request = json.loads(line)
            for name in request["modules"]:
                importlib.import_module(name)
            print(json.dumps({"status": fork(request)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
