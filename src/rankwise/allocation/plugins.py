"""Allocations of one's own: nodes in recipes and plans like any other."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from rankwise.allocation.base import Allocation
from rankwise.plugins import Plugins

PLUGINS = Plugins("allocation", Allocation, "derive it from rankwise.allocation.Allocation")

Plugged = Annotated[SerializeAsAny[Allocation], BeforeValidator(PLUGINS.read)]
"""An allocation that is not part of this package, in a recipe."""
