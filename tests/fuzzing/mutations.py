"""Valid input made invalid: bytes turned, text in other encodings, JSON values replaced by other JSON values.

All draw from a `random.Random`: a seeded one where many inputs are tried, hypothesis' own where a failure is to be
made small.
"""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

PIECES = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"{", b"[" * 300, b"]", b'"',
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null", b"\n", b"\t", b": ", b"- ", b"&a [*a]", b"*a",
    b"!!python/name:os", b"<<: ", b"2026-01-01", b"[/x]", b"\x1b[2J", b"#", b"~", b"0b_", b"|\n", b"%", b"true",
    b"{}", b"[]", b"name",
]  # fmt: skip
"""What turns up where it does not belong."""

WORDS = [
    "", " ", "x", "[/x]", "a" * 300, "../" * 40, "/", ".", "\0", "é", "😀", "\u2028", "nan", "0.5", "null", "name",
    "dense", "svd", "spectral", "plan:", "manual:", "manual:q=nan", "bayesian:5x", "bayesian:1e9x1", "text:x",
    "jsonl:#", "tokens:\0", "bundled:x", "hub:a/b/c/d#e", "90MB", "1e400GB", "-1", "²", "\u0661",
    "|`*_<script>$", "low_rank", "16",
]  # fmt: skip
"""Text in the place of any value."""

NUMBERS = [0, 1, -1, 2, 8, 0.5, -0.0, 1e-320, 1e308, 10**12, 2**31, 2**63, 10**30, -(10**30), 10**400]

KEYS = ["name", "model", "format", "", "x", "method", "__metadata__", "dtype", "shape", "0", "a" * 300, "[/x]", "\0"]


def any_value(random: Random, depth: int = 0) -> Any:
    """A value as JSON or Python may write it, plain or not."""
    kind = random.randrange(10)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(WORDS)
    if kind == 5:
        return random.choice([None, True, False])
    if kind == 6:
        return random.choice([float("nan"), float("inf"), -float("inf"), "\ud800"])
    if kind == 7 and depth < 3:
        return [any_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 8 and depth < 3:
        return {random.choice(KEYS): any_value(random, depth + 1) for _ in range(random.randrange(4))}
    return nested(random.choice([1, 3, 70, 700]), random.random() < 0.5)


def nested(levels: int, mapping: bool) -> Any:
    """Lists or mappings within one another."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if mapping else [value]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value: the container and the key in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, child in items:
            found.append((each, key))
            waiting.append(child)
    return found


def _copy(value: Any) -> Any:
    """A value that shares nothing with this one, None for what is nested too deep to be written."""
    try:
        return json.loads(json.dumps(value))
    except RecursionError:
        return None


def other_value(random: Random, value: Any) -> Any:
    """A JSON value with up to three places changed; the value itself is kept as it is."""
    changed = _copy(value)
    for _ in range(random.randrange(1, 4)):
        places = _places(changed)
        if not places or random.random() < 0.05:
            return any_value(random)
        holder, key = random.choice(places)
        deed = random.randrange(8)
        if deed < 4:
            holder[key] = any_value(random)
        elif deed == 4:
            del holder[key]
        elif deed == 5 and isinstance(holder, dict):
            holder[random.choice(KEYS)] = holder.pop(key)
        elif deed == 6:
            near, far = random.choice(places), random.choice(places)
            near[0][near[1]] = _copy(far[0][far[1]]) if _is_there(near) and _is_there(far) else None
        elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice([-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key])])
    return changed


def _is_there(place: tuple[Any, Any]) -> bool:
    holder, key = place
    return key in holder if isinstance(holder, dict) else key < len(holder)


def other_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with up to three turned, taken out, put in, moved, or all of them in another encoding."""
    for _ in range(random.randrange(1, 4)):
        at, length = random.randrange(len(data) + 1), random.choice([1, 1, 2, 8, 64])
        deed = random.randrange(8)
        if deed == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        elif deed == 1:
            data = data[:at] + data[at + length :]
        elif deed in (2, 3):
            data = data[:at] + random.choice(PIECES) + data[at:]
        elif deed == 4:
            data = data[:at]
        elif deed == 5:
            other = random.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at:]
        elif deed == 6:
            data = data.replace(b"\n", random.choice([b"\r\n", b"\r", b"\n\n", b"\x00"]))
        elif random.random() < 0.3:
            text = data.decode("utf-8", "replace")
            data = text.encode(random.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32"]), "replace")
    return data


def as_json(random: Random, value: Any) -> bytes:
    """JSON text of a value, half of it with signs beyond ASCII as they are."""
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    except RecursionError:
        text = "[" * 2000 + "]" * 2000
    return text.encode("utf-8", "surrogatepass")


def other_json(random: Random, data: bytes) -> bytes:
    """JSON text whose values are changed, or whose bytes are, or both."""
    deed = random.randrange(4)
    if deed:
        data = as_json(random, other_value(random, json.loads(data)))
    return other_bytes(random, data) if deed in (0, 3) else data


def other_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file whose header is changed, or its length, or what follows."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    deed = random.randrange(5)
    if deed < 3:
        header = other_json(random, header)
        length = len(header)
    elif deed == 3:
        length = random.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    if deed == 4 or random.random() < 0.3:
        body = other_bytes(random, body[:4096])
    return struct.pack("<Q", length) + header + body


def other_lines(random: Random, data: bytes) -> bytes:
    """JSON lines of which one is changed, or the bytes of all."""
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    if random.random() < 0.7:
        lines[at] = other_json(random, lines[at].strip()) + random.choice([b"\n", b"\r\n", b"", b"\r\n\xef\xbb\xbf"])
    return b"".join(lines) if random.random() < 0.7 else other_bytes(random, b"".join(lines))
