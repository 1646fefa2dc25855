"""Make a Hugging Face causal language model smaller, and know what was lost."""

from typing import TYPE_CHECKING, Any

from rankwise.flows.compress import Compressed, compress
from rankwise.version import __version__

if TYPE_CHECKING:
    from rankwise.recipes import Recipe
    from rankwise.reports import Report

__all__ = ["Compressed", "Recipe", "Report", "__version__", "compress"]


def __getattr__(name: str) -> Any:
    # `import rankwise` stays light: PyTorch and transformers load with the first use.
    if name == "Recipe":
        from rankwise.recipes import Recipe

        return Recipe
    if name == "Report":
        from rankwise.reports import Report

        return Report
    raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
