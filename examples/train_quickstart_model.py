"""Train the model that `make quickstart` compresses: a small Llama and its tokenizer, from text CPython carries.

    python examples/train_quickstart_model.py --output src/rankwise/quickstart/pydoc-llama

About 15 minutes on two cores. The same Python, PyTorch and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.data.python_text import documents

VOCABULARY, LENGTH, BATCH, SEED = 2048, 256, 8, 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2 * LENGTH
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of token ids, documents separated by the end token; shape `[tokens]`."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
    return torch.tensor(stream)


def windows(stream: torch.Tensor) -> torch.Tensor:
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    losses = [float(model(input_ids=b, labels=b).loss) * len(b) for b in tokens.split(BATCH)]
    return math.exp(sum(losses) / len(tokens))


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[held_out].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    started = time.monotonic()

    texts = {split: list(documents(split)) for split in ("train", "heldout")}
    tokenizer = train_tokenizer(texts["train"])
    train, held_out = (pack(tokenizer, texts[split]) for split in ("train", "heldout"))
    print(f"{len(train)} training tokens, {len(held_out)} held-out tokens", flush=True)

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).float()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
    )
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / arguments.steps))),
    )
    generator = torch.Generator().manual_seed(SEED)
    for step in range(arguments.steps):
        starts = torch.randint(len(train) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([train[s : s + LENGTH] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step + 1 == arguments.steps:
            held = perplexity(model, windows(held_out)[:64])
            print(
                f"step {step}: loss {loss.item():.3f}, held-out {held:.1f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )

    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(train),
        "heldout_tokens": len(held_out),
        "heldout_perplexity": round(perplexity(model.float(), windows(held_out)), 2),
        "heldout_unigram_perplexity": round(unigram_perplexity(train, held_out), 2),
    }
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
