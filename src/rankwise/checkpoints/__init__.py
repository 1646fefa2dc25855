"""Reading and writing Hugging Face checkpoints."""

from rankwise.checkpoints.load import LoadedModel, fingerprint, load_model, load_tokenizer
from rankwise.checkpoints.save import REPORT_FILE, check_output, save_dense, save_low_rank, writing

__all__ = [
    "REPORT_FILE",
    "LoadedModel",
    "check_output",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "save_dense",
    "save_low_rank",
    "writing",
]
