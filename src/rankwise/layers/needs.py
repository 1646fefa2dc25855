"""What a compressed checkpoint needs of what reads it, and whether it is there.

This file imports transformers alone: its source is also written, word for word, into the modelling file of every
checkpoint, which says so by itself where rankwise is not installed.
"""

import re

import transformers

FORMAT_VERSION = 12
"""Of a config's `rankwise` entry, the newest that is read. Since 12 it may name grouped layers that are taken apart;
since 11 experts that are taken apart may be of layouts that no class says; since 10 a head may be two factors; since 9
it may say of which form the blocks of a cut stream are; since 8 a codebook may be levels that its name spells out;
since 7 the entry may say that embeddings and head are codes; since 6 it may name blocks of sizes of their own and dense
layers with a bias, and say how a residual stream was cut; since 5 it may name experts that are taken apart, since 4 a
pivoted layer names the type of its order; earlier ones are read too."""

WITHOUT_GROUPS, WITHOUT_LAYOUTS, WITHOUT_FACTORS, WITHOUT_FORM, WITHOUT_LEVELS = 11, 10, 9, 8, 7
WITHOUT_VOCABULARY, WITHOUT_BLOCKS, WITHOUT_EXPERTS = 6, 5, 4
"""Of an entry that says nothing of these, and names no experts either: older readers read it as well."""

MINIMUM_TRANSFORMERS = "5.10"
"""The oldest transformers whose loading this code was written for."""

_NEEDED = re.compile(r"\s*>=\s*([0-9]+(?:\.[0-9]+)*)\s*")


def release(version: str) -> tuple:
    """A version's leading numbers: `5.23.0.dev0` gives `(5, 23, 0)`."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def unmet(entry: dict, known: int = FORMAT_VERSION, have: str = "") -> str:
    """Why this code cannot read a checkpoint, one sentence; empty when it can.

    Args:
        entry: the config's `rankwise` entry.
        known: the newest format that is read.
        have: version of transformers; the installed one where it is empty.
    """
    have = have or transformers.__version__
    given = entry.get("format")
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        return f"The checkpoint's format is {given!r}, which is none."
    if given > known:
        return f"The checkpoint is of format {given}; this code reads formats 1 to {known}."
    needs = entry.get("needs", {})
    if not isinstance(needs, dict):
        return f"The checkpoint's needs are {needs!r}, which cannot be read."
    for name, wanted in {"transformers": f">={MINIMUM_TRANSFORMERS}", **needs}.items():
        least = _NEEDED.fullmatch(str(wanted))
        if name != "transformers" or least is None:
            return f"The checkpoint needs {name} {wanted}, of which this code knows nothing."
        if release(have) < release(least.group(1)):
            return f"The checkpoint needs transformers {least.group(1)} or newer; installed is {have}."
    return ""


def require(entry: dict) -> None:
    """Raise unless this code can read a checkpoint.

    Args:
        entry: the config's `rankwise` entry.

    Raises:
        ImportError: saying what is missing.
    """
    if problem := unmet(entry):
        raise ImportError(f"{problem} Install what it needs, or a newer rankwise.")
