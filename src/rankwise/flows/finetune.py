"""The flow of fine-tuning: compressed checkpoint -> factors -> training -> merged -> checkpoint of the same kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rankwise.data import parse_source
from rankwise.errors import DataError, RankwiseError
from rankwise.repair import FullFactors, Lora, LowRankFactors, Subspace

if TYPE_CHECKING:
    from rankwise.progress import Reporter

METHODS: dict[str, type[Subspace | Lora | FullFactors | LowRankFactors]] = {
    "subspace": Subspace,
    "lora": Lora,
    "full-factors": FullFactors,
    "lowrank": LowRankFactors,
}


class FineTune(BaseModel):
    """A fine-tuning of a compressed checkpoint.

    Attributes:
        model: directory that rankwise wrote.
        data: text source; `alpaca:FILE.jsonl` for instructions.
        output: directory to write.
        method: `subspace`, `lora` or `full-factors`; `lowrank` for a quantised model.
        settings: of the method; None for its defaults.
        length: most tokens an example; None means the smaller of 512 and the model's context.
        output_only: learn from the outputs of instructions alone.
        original: the model that was compressed, for the loss `kl`; None takes the one the report names.
        held_out: examples at the end that are not learned from: what is trained is judged on them.
        evaluation: text source to score before and after.
        seed: for the order of examples.
        device: `auto`, `cpu`, `cuda`, ...
        precision: as in a recipe.
        trust_remote_code: run code that the original ships.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: str
    output: str
    method: Literal["subspace", "lora", "full-factors", "lowrank"] = "full-factors"
    settings: Subspace | Lora | FullFactors | LowRankFactors | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    output_only: bool = False
    original: str | None = None
    held_out: Annotated[int, Field(ge=1)] = 16
    evaluation: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "stored", "float32"] = "auto"
    trust_remote_code: bool = False

    @property
    def training(self) -> Subspace | Lora | FullFactors | LowRankFactors:
        """The settings that hold."""
        return self.settings or METHODS[self.method]()

    @field_validator("data", "evaluation")
    @classmethod
    def _source(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parse_source(text)
            except RankwiseError as problem:
                raise ValueError(f"{problem.problem} {problem.remedy or ''}".strip()) from None
        return text

    @model_validator(mode="after")
    def _settings_of_method(self) -> FineTune:
        if type(self.training) is not METHODS[self.method]:
            raise ValueError(f"the settings are not those of {self.method}")
        return self


def finetune(wanted: FineTune, *, restart: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Fine-tune a compressed model and write it as a checkpoint of the same kind.

    A killed training goes on from its last checkpoint when the same call is made again.

    Args:
        wanted: the whole run.
        restart: throw away what an earlier training for this output left.
        reporter: told about stages, progress and notes.

    Returns:
        The report that is written with the checkpoint.

    Raises:
        RankwiseError: for anything the user can mend.
    """
    # Imported here so that `import rankwise` stays light.
    from rankwise import stages
    from rankwise.checkpoints import REPORT_FILE, check_output, fingerprint, load_model
    from rankwise.data import Examples, load_examples
    from rankwise.device import computing
    from rankwise.evaluation import measure_cost
    from rankwise.progress import Reporter
    from rankwise.recipes import Recipe
    from rankwise.repair import mean_loss
    from rankwise.runs.run import write_atomically
    from rankwise.sizes import RankPlan
    from rankwise.stages import tuning

    reporter = reporter or Reporter(show=False)
    source, output = Path(wanted.model), Path(wanted.output)
    check_output(output)
    report = tuning.report_of(source, REPORT_FILE)
    plan = RankPlan.load(source / "plan.json")
    folder = output.absolute().with_name(f".{output.name}.training")
    with reporter.stage("load"):
        device = stages.device_of(Recipe(model=wanted.model, device=wanted.device))
        loaded = load_model(wanted.model, precision=wanted.precision, device=device)
        length = wanted.length or min(512, loaded.context or 512)
        if loaded.context is not None and length > loaded.context:
            reporter.note(f"examples are cut to the context of {loaded.context} tokens, not {length}")
            length = loaded.context
        examples = load_examples(
            parse_source(wanted.data),
            loaded.tokenizer,
            loaded.vocabulary,
            length=length,
            output_only=wanted.output_only,
        )
        if examples.shortened:
            reporter.note(f"{examples.shortened} of {len(examples)} examples were longer than {length} tokens: cut")
        if len(examples) <= wanted.held_out:
            raise DataError(
                f"The data holds {len(examples)} examples, and {wanted.held_out} are held out to judge by.",
                where=wanted.data,
                remedy="give more data, or a smaller --held-out",
            )
        learned = Examples(examples.ids[: -wanted.held_out], examples.labels[: -wanted.held_out], examples.source)
        judged = Examples(examples.ids[-wanted.held_out :], examples.labels[-wanted.held_out :], examples.source)
        # Flat, so that a difference can be named: --lr rather than "settings".
        settings = wanted.model_dump(mode="json", exclude={"settings"}) | wanted.training.model_dump(mode="json")
        settings["contents of the data"] = examples.fingerprint
        settings["weights of the model"] = fingerprint(loaded.model, loaded.stored_dtypes)
        tuning.same_settings(folder, settings, restart)
        sites = tuning.sites_of(loaded, plan)
        before = measure_cost(loaded.model, sites, loaded.stored_dtypes)
        as_stored = tuning.parts_of(loaded, sites)
        dtypes = tuning.open_factors(loaded, sites, plan, wanted.training)
        teacher = tuning.teacher_of(wanted, report, loaded, device, reporter) if wanted.training.loss == "kl" else None
    scores: list[dict[str, Any] | None] = [None, None]
    with reporter.stage("evaluate before"):
        scores[0] = tuning.score_tuned(wanted, loaded, reporter)
        with computing(loaded.model):
            start = mean_loss(loaded.model, judged, wanted.training, teacher)
    with reporter.stage(f"train {wanted.method}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / tuning.SETTINGS_FILE, json.dumps(settings, indent=2))
        facts = tuning.train_factors(wanted, loaded, sites, plan, learned, teacher, folder, reporter)
        with computing(loaded.model):
            after = mean_loss(loaded.model, judged, wanted.training, teacher)
        facts |= {"loss_before": start, "loss_after": after, "accepted": after < start}
        if not facts["accepted"]:
            tuning.put_back(loaded, *as_stored)
            reporter.note(
                f"the training was undone: the loss on {len(judged)} examples held out rose from {start:.4g} to "
                f"{after:.4g}; a lower --lr may help"
            )
    stored: Mapping[str, Mapping[str, Any]] = {}
    if facts["accepted"]:
        with reporter.stage("storage"):
            plan, stored = tuning.store_tuned(wanted, loaded, sites, plan, dtypes, examples.ids[0][None, :64], reporter)
    cost = measure_cost(loaded.model, sites, loaded.stored_dtypes)
    with reporter.stage("evaluate after"):
        scores[1] = tuning.score_tuned(wanted, loaded, reporter)
    facts = {
        "settings": {**wanted.model_dump(mode="json"), "settings": wanted.training.model_dump(mode="json")},
        "examples": {"count": len(learned), "held_out": len(judged), "tokens": learned.tokens},
        "before": scores[0],
        "after": scores[1],
        **facts,
    }
    with reporter.stage("checkpoint"):
        new = tuning.write_tuned(report, output, loaded, sites, plan, stored, (before, cost), facts, reporter)
    shutil.rmtree(folder, ignore_errors=True)
    return new
