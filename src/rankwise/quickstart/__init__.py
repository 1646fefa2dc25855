"""The bundled model, compressed from end to end."""

from rankwise.quickstart.run import MODEL, run

__all__ = ["MODEL", "run"]
