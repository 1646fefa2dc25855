"""What each line of `compress` does, in the same order. Every stage is keyed by all that its result depends on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from rankwise.budget import RankPlan
from rankwise.checkpoints import REPORT_FILE, LoadedModel, fingerprint, save_dense, save_low_rank, writing
from rankwise.data import Sequences, load_sequences, parse_source
from rankwise.device import best_device, describe
from rankwise.errors import DataError, ModelError, NotFiniteError, RankwiseError, RecipeError
from rankwise.evaluation import Cost, Perplexity, perplexity
from rankwise.factors import Basis
from rankwise.layers import substitute
from rankwise.progress import Reporter
from rankwise.recipe import Calibration, Evaluation, Recipe
from rankwise.reports import build_report, model_card
from rankwise.runs import Run, Stage
from rankwise.sites import Site, find_sites, fused_expert_parameters, share_inputs
from rankwise.statistics import Need, SiteStatistics, Store, collect, save_record, streams_of
from rankwise.version import __version__

_STAGE_FORMAT = 1
"""Raised when the contents or the arithmetic of a stage change, so that old stages are not taken for new ones."""

_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Texts:
    """Token sequences of a run."""

    calibration: Sequences
    evaluation: Sequences | None


@dataclass(frozen=True)
class Work:
    """What all stages share."""

    recipe: Recipe
    run: Run
    loaded: LoadedModel
    texts: Texts
    sites: list[Site]
    fingerprint: str
    reporter: Reporter


def device_of(recipe: Recipe) -> torch.device:
    """The device a recipe names.

    Raises:
        RecipeError: when PyTorch has no such device here.
    """
    if recipe.device == "auto":
        return best_device()
    try:
        device = torch.device(recipe.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise RecipeError(
            f"The device {recipe.device!r} cannot be used ({str(problem).splitlines()[0]}).",
            where="device",
            remedy="use auto or cpu",
        ) from None
    return device


def sequence_length(settings: Calibration | Evaluation, context: int | None) -> int | None:
    """Tokens a sequence: what is asked, else 512 or the context if shorter, else a `tokens:` file's own.

    Raises:
        DataError: when more is asked than the model's context.
    """
    if settings.length is None:
        ready_made = parse_source(settings.source).kind == "tokens"
        return None if ready_made else min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and settings.length > context:
        raise DataError(
            f"Sequences of {settings.length} tokens are longer than the model's context of {context}.",
            where=settings.source,
            remedy=f"use a length of at most {context}",
        )
    return settings.length


def read_texts(recipe: Recipe, loaded: LoadedModel) -> Texts:
    """Tokenize calibration and evaluation text, before anything slow starts.

    Raises:
        DataError: when a source cannot be read or holds too little.
    """
    calibration = read_sequences(recipe.calibration, loaded, recipe.seed, skip=0)
    scored = recipe.evaluation
    return Texts(calibration, None if scored is None else read_sequences(scored, loaded, scored.seed, scored.skip))


def read_sequences(settings: Calibration | Evaluation, loaded: LoadedModel, seed: int, skip: int) -> Sequences:
    """Tokenize one source as its settings say; errors as for `read_texts`."""
    return load_sequences(
        parse_source(settings.source),
        loaded.tokenizer,
        loaded.vocabulary,
        length=sequence_length(settings, loaded.context),
        count=settings.sequences,
        seed=seed if settings.sample == "random" else None,
        first=skip,
    )


def begin(recipe: Recipe, run: Run, loaded: LoadedModel, texts: Texts, reporter: Reporter) -> Work:
    """Find the sites and what they share, and say what is unusual about this run.

    Raises:
        ModelError: when the model is compressed already or has no linear layers.
    """
    if hasattr(loaded.model.config, "rankwise"):
        raise ModelError("The model is compressed already.", where=recipe.model, remedy="compress the original")
    found = find_sites(loaded.model)
    for site in found:
        site.weight(loaded.model)
    probe = texts.calibration.ids[:1].to(loaded.model.device)
    sites = share_inputs(loaded.model, found, probe)
    idle = len(found) - len(sites)
    if idle:
        reporter.note(f"{idle} linear layers took no token of the first calibration sequence and stay dense, uncounted")
    fused = fused_expert_parameters(loaded.model)
    if fused:
        reporter.note(f"{fused} parameters of fused experts (3-D tensors) stay dense and are not counted in the budget")
    calibration = texts.calibration
    asked = recipe.calibration.sequences
    if asked is not None and len(calibration.ids) < asked:
        reporter.note(
            f"the calibration source holds {len(calibration.ids)} sequences, fewer than the {asked} asked for"
        )
    if calibration.cut:
        reporter.note("the calibration source is very large; its first 64 million characters were read")
    return Work(recipe, run, loaded, texts, sites, fingerprint(loaded.model, loaded.stored_dtypes), reporter)


def choose_ranks(work: Work) -> RankPlan:
    """Spread the budget over the sites.

    Raises:
        BudgetError: when nothing fits.
    """
    recipe = work.recipe
    return RankPlan.make(
        work.sites,
        recipe.allocation.ranks(work.sites, recipe.budget),
        recipe.budget,
        architecture=type(work.loaded.model).__name__,
        method=recipe.method.name,
        allocation=recipe.allocation.name,
    )


def _model_key(work: Work) -> dict[str, Any]:
    return {
        "format": _STAGE_FORMAT,
        "model": work.fingerprint,
        "precision": str(next(work.loaded.model.parameters()).dtype),
        "device": work.loaded.model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _calibration_key(work: Work) -> dict[str, Any]:
    calibration = {"ids": work.texts.calibration.fingerprint, "batch_size": work.recipe.calibration.batch_size}
    return {**_model_key(work), "calibration": calibration, "seed": work.recipe.seed}


def collect_statistics(work: Work) -> Store:
    """Collect what the method asks for and no finished stage holds: one pass for all of it.

    Raises:
        NotFiniteError: naming the layer.
    """
    requests = work.recipe.method.requests()
    stages: dict[Need, Stage] = {
        request.need: work.run.stage(f"statistics-{request.need}", {**_calibration_key(work), **request.settings()})
        for request in requests
    }
    missing = [request for request in requests if not stages[request.need].done]
    if missing:
        snapshot = work.run.stage("snapshot", {**_calibration_key(work), "requests": [r.settings() for r in missing]})
        records = collect(
            work.loaded.model,
            work.sites,
            work.texts.calibration.ids,
            missing,
            batch_size=work.recipe.calibration.batch_size,
            seed=work.recipe.seed,
            snapshot=snapshot.partial,
            reporter=work.reporter,
        )
        for need, by_stream in records.items():
            with stages[need].making() as folder:
                for key, record in by_stream.items():
                    save_record(folder / f"{key}.safetensors", record)
        snapshot.discard()
    stream_of = {
        need: {name: stream.key for stream in streams_of(need, work.sites) for name in stream.sites} for need in stages
    }
    return Store({need: stage.folder for need, stage in stages.items()}, stream_of)


def _save_basis(path: Path, basis: Basis) -> None:
    parts = {
        "left": basis.left,
        "right": basis.right,
        "energy": basis.energy,
        "mean_output": basis.mean_output,
        "mean_code": basis.mean_code,
        "damping": torch.tensor([basis.damping]),
    }
    fresh = path.with_suffix(".new")
    save_file({name: part.float().contiguous() for name, part in parts.items() if part is not None}, fresh)
    fresh.replace(path)


def _load_basis(path: Path) -> Basis:
    parts: dict[str, Any] = dict(load_file(path))
    damping = float(parts.pop("damping"))
    return Basis(**parts, damping=damping)


def decompose_sites(work: Work, store: Store) -> Path:
    """Factor every site at full rank; a site that is on disk already is not done again.

    Returns:
        The folder with one basis a site.

    Raises:
        NotFiniteError: naming the site.
    """
    method = work.recipe.method
    key = (
        {**_calibration_key(work), "method": method.model_dump()}
        if method.requests()
        else {**_model_key(work), "method": method.model_dump()}
    )
    stage = work.run.stage(f"bases-{method.name}", key)
    if stage.done:
        return stage.folder
    with stage.making() as folder:
        left = [site for site in work.sites if not (folder / f"{site.name}.safetensors").exists()]
        done = len(work.sites) - len(left)
        for site in work.reporter.track(left, "decomposition", total=len(work.sites), done=done):
            weight = site.weight(work.loaded.model).double().cpu()
            bias = site.bias(work.loaded.model)
            try:
                basis = method.decompose(
                    weight, SiteStatistics(site, weight, None if bias is None else bias.cpu(), store)
                )
            except (torch.linalg.LinAlgError, ValueError) as problem:
                raise NotFiniteError(
                    f"The decomposition failed: {problem}.",
                    where=site.name,
                    remedy="use more calibration text, or another method",
                ) from problem
            basis.check_finite(site.name)
            _save_basis(folder / f"{site.name}.safetensors", basis)
    return stage.folder


def put_factors(work: Work, bases: Path, plan: RankPlan) -> dict[str, dict[str, float]]:
    """Replace every site that is not dense by its factors, in the checkpoint's own dtype.

    Returns:
        By site name: the share of the method's energy that was dropped, and the damping that was used.
    """
    work.loaded.to_stored_dtypes()
    losses = {}
    for site in work.sites:
        rank = plan.ranks[site.name]
        if rank is None:
            continue
        basis = _load_basis(bases / f"{site.name}.safetensors")
        factors = basis.truncate(rank, site.bias(work.loaded.model))
        substitute(work.loaded.model, site, factors)
        whole = float(basis.energy.double().sum())
        dropped = float(basis.energy[rank:].double().sum()) / whole if whole > 0 else 0.0
        losses[site.name] = {"dropped_energy": dropped, "damping": basis.damping}
    work.loaded.to_compute_dtypes()
    return losses


def score(work: Work, what: str, plan: RankPlan | None = None) -> Perplexity | None:
    """Perplexity of the model as it stands, kept as a stage; None when the recipe asks for none."""
    settings, texts = work.recipe.evaluation, work.texts.evaluation
    if settings is None or texts is None:
        return None
    key: dict[str, Any] = {
        **_model_key(work),
        "ids": texts.fingerprint,
        "stride": settings.stride,
        "batch": settings.batch_size,
    }
    if plan is not None:
        key |= {"plan": plan.ranks, "method": work.recipe.method.model_dump(), **_calibration_key(work)}
    stage = work.run.stage(f"score-{what}", key)
    if not stage.done:
        found = perplexity(
            work.loaded.model,
            texts.ids,
            stride=settings.stride,
            batch_size=settings.batch_size,
            reporter=work.reporter,
            description=f"perplexity, {what}",
        )
        with stage.making() as folder:
            (folder / "perplexity.json").write_text(json.dumps(asdict(found)))
    return Perplexity(**json.loads((stage.folder / "perplexity.json").read_text()))


def _machine(device: torch.device) -> dict[str, str]:
    return {
        "device": describe(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rankwise": __version__,
    }


def write(
    work: Work,
    plan: RankPlan,
    losses: Mapping[str, Mapping[str, float]],
    costs: tuple[Cost, Cost],
    scores: tuple[Perplexity | None, Perplexity | None],
) -> dict[str, Any]:
    """Save the checkpoint with its report and model card; whole or not at all.

    Returns:
        The report.

    Raises:
        OutputError: when the output is not ours to replace, or the disk is full.
        ModelError: when the architecture cannot be written in the format asked for.
    """
    recipe, loaded = work.recipe, work.loaded
    loaded.to_stored_dtypes()
    calibration = work.texts.calibration
    report = build_report(
        recipe=recipe.model_dump(mode="json"),
        fingerprint=work.fingerprint,
        plan=plan,
        roles={site.name: (site.block, site.role) for site in work.sites},
        losses=losses,
        costs=costs,
        scores=scores,
        calibration={
            "source": calibration.source,
            "sequences": calibration.ids.shape[0],
            "length": calibration.ids.shape[1],
            "available": calibration.available,
            "fingerprint": calibration.fingerprint,
        },
        machine=_machine(loaded.model.device),
        notes=work.reporter.notes,
        stages=work.reporter.stages,
        run_directory=str(work.run.directory),
    )
    if recipe.output is None:
        return report
    save = save_low_rank if recipe.format == "low_rank" else save_dense
    try:
        with writing(Path(recipe.output)) as folder:
            save(folder, loaded, work.sites, recipe.max_shard_size)
            report["bytes_on_disk"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
            (folder / "plan.json").write_text(plan.model_dump_json(indent=2) + "\n")
            (folder / "README.md").write_text(model_card(report))
    except RankwiseError:
        work.reporter.note(f"finished stages are kept in {work.run.directory}")
        raise
    return report
