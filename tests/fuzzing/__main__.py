"""Try many inputs of every kind and count what became of each: `python -m fuzzing [--inputs N] [--seed S] [WORD...]`.

Prints one line a kind, and in full each first exception of its sort that is no `RankwiseError`. Exit status 1 when
there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.kinds import Kind, all_kinds
from rankwise.errors import RankwiseError

_SECONDS_EACH = 20

SORTS = ("accepted", "refused", "foreign")


def outcome(kind: Kind, drawn: Any) -> BaseException | None:
    """What reading one input ends with: nothing, a `RankwiseError`, or something foreign."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            kind.read(drawn)
    except RankwiseError as problem:
        # An error that cannot be printed helps nobody.
        str(problem).encode("utf-8", "backslashreplace")
        return problem
    except Exception as problem:
        return problem
    return None


def _too_long(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"reading took longer than {_SECONDS_EACH} s")


def _place(problem: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if "rankwise" in f.filename]
    last = frames[-1] if frames else traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__} in {Path(last.filename).name}:{last.lineno}"


def main(words: list[str]) -> int:
    """Try them; 0 when every input was taken or refused in words."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts there")
    parser.add_argument("kinds", nargs="*", help="words in the names of the kinds to try")
    given = parser.parse_args(words)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_long)
    started, tried, foreign = time.monotonic(), 0, 0
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        kinds = [k for k in all_kinds(Path(name)) if not given.kinds or any(word in k.name for word in given.kinds)]
        shares = sum(kind.share for kind in kinds)
        print(f"{'input':<30} {'tried':>8} {'accepted':>9} {'refused':>8} {'foreign':>8} {'seconds':>8}", flush=True)
        for kind in kinds:
            begun = time.monotonic()
            counts = _try_kind(kind, max(1, round(given.inputs * kind.share / shares)), given.seed)
            records.append({"input": kind.name, "tried": counts.total(), **dict.fromkeys(SORTS, 0), **counts})
            tried, foreign = tried + counts.total(), foreign + counts["foreign"]
            row = (counts.total(), *(counts[each] for each in SORTS))
            numbers = " ".join(f"{n:>{width},}" for n, width in zip(row, (8, 9, 8, 8), strict=True))
            print(f"{kind.name:<30} {numbers} {time.monotonic() - begun:>8.0f}", flush=True)
    print(f"{tried:,} inputs in {time.monotonic() - started:.0f} s, seed {given.seed}: {foreign} foreign exceptions")
    if given.json is not None:
        given.json.write_text(json.dumps(records))
    return int(foreign > 0)


def _try_kind(kind: Kind, count: int, seed: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    random = Random(f"{kind.name} {seed}")
    for number in range(count):
        drawn = kind.make(random)
        signal.alarm(_SECONDS_EACH)
        problem = outcome(kind, drawn)
        signal.alarm(0)
        sort = "accepted" if problem is None else "refused" if isinstance(problem, RankwiseError) else "foreign"
        counts[sort] += 1
        if sort == "foreign" and problem is not None:
            seen[_place(problem)] += 1
            if seen[_place(problem)] == 1:
                print(f"--- {kind.name}, input {number}: {str(drawn)[:400]!r}", flush=True)
                traceback.print_exception(problem, limit=-6, file=sys.stdout)
        if sys.stderr.isatty() and number % 200 == 0:
            print(f"\r{kind.name}: {number:,} of {count:,}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
