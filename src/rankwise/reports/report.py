"""`Report`: everything that was done and measured, as a frozen object and as one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from rankwise.errors import ModelError
from rankwise.evaluation import Cost
from rankwise.reading import UnreadableError, first_problem, parse_json, read_bytes, shown
from rankwise.reports.outcome import MemoryUse, Speed, Verdict
from rankwise.reports.parts import (
    Bits,
    CalibrationText,
    Kept,
    Machine,
    Part,
    RecipeSettings,
    Scores,
    SearchSummary,
    SiteReport,
    Timed,
)
from rankwise.reports.trained import FineTuneStep, RepairStep
from rankwise.sizes import Storage

REPORT_FORMAT: Final = "rankwise-report/1"

COUNTED = "weights of the decoder's linear layers; embeddings, head, norms and biases are not counted"


class Report(Part):
    """What a compression did, and every fine-tuning after it. `rankwise_report.json` has it under the same keys.

    Bytes are of parameters in the dtypes they are stored in. A number that is None though something was measured was
    not finite. `model_dump(mode="json")` is what the file holds.

    Attributes:
        format: version of the file's form.
        recipe: of the compression.
        model_fingerprint: hash of the original's weights.
        architecture: class name of the original.
        keep: fraction of the linear weights, asked for and got.
        bits: bits a linear weight; None where a fraction was kept in numbers.
        storage: how a matrix of low rank is stored in the checkpoint's own numbers, as the budget said.
        size: bytes of all weight files asked for; None when the size was spelled otherwise.
        coded: whether any site holds codes.
        counted: what `keep` and `bits` are of, in words.
        before: size of the original.
        after: size of the result.
        biases_added: biases that make up for the mean of what was dropped; how many numbers.
        evaluation: perplexity before and after; None when no text was given, and after a fine-tuning.
        calibration: what the statistics were taken on.
        search: what the search did; None when nothing was searched.
        repair: what each step of the repair did, in order.
        groups: by group of the search (or by role), what it takes a weight: a fraction or bits, as the budget says.
        sites: by name of each linear weight, what became of it.
        stages: by name, time and memory of each stage; after a fine-tuning those of the fine-tuning.
        machine: where the compression ran.
        notes: what the user was told.
        run_directory: where finished stages are.
        bytes_on_disk: of all weight files; None when none was written.
        finetune: what each fine-tuning did, in order.
        memory: how the model was held; None in a report of 0.1.0.
        speed: tokens a second before and after; None where they were not measured, and after a fine-tuning.
        verdict: what was lost, and what to try next; None after a fine-tuning.
    """

    format: Literal["rankwise-report/1"] = REPORT_FORMAT
    recipe: RecipeSettings
    model_fingerprint: str
    architecture: str
    keep: Kept
    bits: Bits | None
    storage: Storage
    size: int | None
    coded: bool
    counted: str = COUNTED
    before: Cost
    after: Cost
    biases_added: int
    evaluation: Scores | None
    calibration: CalibrationText
    search: SearchSummary | None
    repair: tuple[RepairStep, ...]
    groups: dict[str, float]
    sites: dict[str, SiteReport]
    stages: dict[str, Timed]
    machine: Machine
    notes: tuple[str, ...]
    run_directory: str
    bytes_on_disk: int | None = None
    finetune: tuple[FineTuneStep, ...] = ()
    memory: MemoryUse | None = None
    speed: Speed | None = None
    verdict: Verdict | None = None

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a report file, of this version or of 0.1.0.

        Raises:
            ModelError: when it cannot be read, naming its format if that is another, or the first key that is wrong.
        """
        try:
            content = read_bytes(path)
        except UnreadableError as problem:
            raise ModelError(
                f"The report cannot be read ({problem}).",
                where=str(path),
                remedy="give the rankwise_report.json of a directory that rankwise wrote",
            ) from None
        try:
            # 0.1.0 wrote infinities; the keys that may hold one say so themselves.
            values = parse_json(content, finite=False)
        except UnreadableError as problem:
            raise ModelError(f"The report is not JSON: {problem}.", where=str(path), remedy=_MAKE_AGAIN) from None
        found = values.get("format") if isinstance(values, dict) else None
        if found is None:
            raise ModelError(
                "The file is no report: it has no format.",
                where=str(path),
                remedy="give the rankwise_report.json of a directory that rankwise wrote",
            )
        if found != REPORT_FORMAT:
            raise ModelError(
                f"The report is of format {shown(found)}, and this version reads {REPORT_FORMAT!r}.",
                where=str(path),
                remedy=f"use the version of rankwise that wrote it, or {_MAKE_AGAIN}",
            )
        try:
            # The two keys that 0.1.0 did not write: it knew no size, and bits of codes alone.
            report = cls.model_validate({"size": None, "coded": values.get("bits") is not None, **values})
        except ValidationError as problem:
            raise _explained(problem, str(path)) from None
        return report._with_bits_of_factors()

    def save(self, path: Path | str) -> None:
        """Write it as a file.

        Raises:
            OSError: when it cannot be written.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def _with_bits_of_factors(self) -> Report:
        """The same, with the bits of L and R at each coded site, which 0.1.0 gave with the method alone."""
        lr_bits = getattr(self.recipe.method, "lr_bits", None)
        untold = {
            name: site.model_copy(update={"lr_bits": lr_bits if site.rank else None})
            for name, site in self.sites.items()
            if site.q_bits is not None and "lr_bits" not in site.model_fields_set
        }
        return self.model_copy(update={"sites": self.sites | untold})


_MAKE_AGAIN = "make the checkpoint again with rankwise compress"
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _explained(problem: ValidationError, path: str) -> ModelError:
    """One error for people from pydantic's list: an unknown key, which explains one that is missing, else the first."""
    error, place, message = first_problem(problem, before=_UNKNOWN)
    if error["type"] in _UNKNOWN:
        return ModelError(
            f"{shown(error['loc'][-1])} is no key of a report.",
            where=f"{path}: {place}",
            remedy="use the version of rankwise that wrote it, or take the key out",
        )
    if error["type"] == "missing":
        return ModelError(f"The report lacks {place!r}.", where=path, remedy=_MAKE_AGAIN)
    return ModelError(f"The report cannot be read: {message}.", where=f"{path}: {place}", remedy=_MAKE_AGAIN)
