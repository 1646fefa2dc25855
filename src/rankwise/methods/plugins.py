"""Methods of one's own: nodes in recipes and plans like any other."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from rankwise.methods.base import Method
from rankwise.plugins import Plugins

PLUGINS = Plugins("method", Method, "derive it from rankwise.methods.Factorisation or Method")

Plugged = Annotated[SerializeAsAny[Method], BeforeValidator(PLUGINS.read)]
"""A method that is not part of this package, in a recipe."""
