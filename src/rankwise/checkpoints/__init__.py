"""Reading and writing Hugging Face checkpoints."""

from rankwise.checkpoints.companions import missing_processor
from rankwise.checkpoints.compressed import fetched
from rankwise.checkpoints.empty import empty_model
from rankwise.checkpoints.load import LoadedModel, fingerprint, load_model, load_tokenizer, read_config
from rankwise.checkpoints.origin import front_matter
from rankwise.checkpoints.output import (
    FILES_FILE,
    REPORT_FILE,
    check_model,
    check_output,
    listed,
    made_from,
    reserved,
    writing,
)
from rankwise.checkpoints.reload import check_reload, expect_reload
from rankwise.checkpoints.save import is_plain, save_dense, save_low_rank

__all__ = [
    "FILES_FILE",
    "REPORT_FILE",
    "LoadedModel",
    "check_model",
    "check_output",
    "check_reload",
    "empty_model",
    "expect_reload",
    "fetched",
    "fingerprint",
    "front_matter",
    "is_plain",
    "listed",
    "load_model",
    "load_tokenizer",
    "made_from",
    "missing_processor",
    "read_config",
    "reserved",
    "save_dense",
    "save_low_rank",
    "writing",
]
