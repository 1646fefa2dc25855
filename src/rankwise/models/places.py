"""Where a site lies and what it does there, read off its name and those of the layers beside it."""

from __future__ import annotations

from collections.abc import Iterable

_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}

_ELSEWHERE = {"out_proj": ("in_proj",), "gate_proj": ("q_proj", "k_proj", "kv_proj", "qkv_proj")}
"""Beside layers whose names start so a layer is no output of attention (but of a state space) and no gate of an MLP."""

Place = tuple[int, str]
"""Block and role."""


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """Block and role of every site: the first number in its path, and its last part.

    Of layers that lie in one weight, which are counted from 0, the role is the part before.

    `out_proj` of a state-space block and `gate_proj` of attention keep their names as roles: they are other things than
    the `o` of attention and the `gate` of an MLP.

    Args:
        names: of all sites of a model.
    """
    parts = {name: name.split(".") for name in names}
    beside: dict[str, set[str]] = {}
    for path in parts.values():
        beside.setdefault(".".join(path[:-1]), set()).add(path[-1])
    found = {}
    for name, path in parts.items():
        block = next((int(part) for part in path if part.isdecimal() and len(part) < 10), 0)
        others, leaf = beside[".".join(path[:-1])], path[-1]
        if len(others) > 1 and others == {str(number) for number in range(len(others))}:
            leaf = path[-2]
        elsewhere = any(other.startswith(start) for start in _ELSEWHERE.get(leaf, ()) for other in others)
        found[name] = block, leaf if elsewhere else _ROLES.get(leaf, leaf)
    return found
