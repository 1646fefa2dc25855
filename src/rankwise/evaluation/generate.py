"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.errors import DataError
from rankwise.evaluation.chat import chat_ids


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    template: bool = False,
) -> str:
    """Continue a prompt.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompt: text to continue; the start token when empty.
        new_tokens: most tokens to add.
        temperature: 0 decodes greedily, else samples at this temperature with top-p 0.95.
        seed: for sampling.
        template: put the prompt into the tokenizer's chat template, as what a user says.

    Returns:
        Prompt and continuation; the answer alone with a template.

    Raises:
        DataError: when there is no tokenizer, or no template where one is asked for.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so it cannot take a prompt.", remedy="add the tokenizer files")
    device = next(model.parameters()).device
    ids = (
        chat_ids(tokenizer, [{"role": "user", "content": prompt}])
        if template
        else tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    )
    ids = {name: value.to(device) for name, value in ids.items()}
    if not ids["input_ids"].shape[1]:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = {"input_ids": torch.tensor([[start]], device=device)}
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**ids, max_new_tokens=new_tokens, pad_token_id=pad, **options)
    begin = ids["input_ids"].shape[1] if template else 0
    return str(tokenizer.decode(output[0, begin:], skip_special_tokens=True))
