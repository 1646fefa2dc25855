"""Make a Hugging Face causal language model smaller, and know what was lost."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rankwise.compress import Compressed, compress
    from rankwise.recipe import Recipe

__all__ = ["Compressed", "Recipe", "__version__", "compress"]


def __getattr__(name: str) -> Any:
    # `import rankwise` stays light: PyTorch and transformers load with the first use.
    if name in ("Compressed", "compress"):
        from importlib import import_module

        module = import_module("rankwise.compress")
        globals().update(Compressed=module.Compressed, compress=module.compress)
    elif name == "Recipe":
        from rankwise.recipe import Recipe

        globals()["Recipe"] = Recipe
    else:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    return globals()[name]
