"""What jobs do, in this process or at a worker: each a function of a `Hand` and a folder to write files into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.checkpoints import load_model
from rankwise.device import named_device
from rankwise.errors import ModelError, NotFiniteError, RankwiseError
from rankwise.evaluation import Objective
from rankwise.factors import Factors, Fit
from rankwise.methods import AtSite, Looking, Outlook
from rankwise.models import Site
from rankwise.progress import Reporter, give_back_memory
from rankwise.recipes import recipe_from
from rankwise.runs import SCRATCH, Run
from rankwise.sizes import Cut
from rankwise.stages.at_site import draw_for, naming, on_gpu_or_cpu, weight_and_statistics
from rankwise.stages.chosen import watched
from rankwise.stages.fitted import save_factors
from rankwise.stages.judged import judging
from rankwise.stages.keys import calibration_key, chosen_key
from rankwise.stages.looked import load_outlook, outlook_file, outlook_stage, save_outlook
from rankwise.stages.measuring import finished_store, requests_of
from rankwise.stages.work import Texts, Work, begin
from rankwise.statistics import HIDDEN_GB, Store, collecting, save_totals

_LARGE = 1 << 21
"""Numbers of a weight from which on what was freed is worth the time to give it back."""


class Hand:
    """What jobs work on: a run, its statistics and what was seen in its weights, as they are on the disk.

    Args:
        work: the run.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._judging = ExitStack()
        self._objective: Objective | None = None

    @cached_property
    def store(self) -> Store:
        """Finished statistics."""
        return finished_store(self.work)

    def dense(self) -> Work:
        """The run, its model as it was loaded: after plans were judged, that is put back."""
        self.close()
        return self.work

    def site(self, name: str) -> Site:
        """A site by its name."""
        return next(site for site in self.work.sites if site.name == name)

    def looked(self, site: Site, q_bits: int) -> Outlook | None:
        """The outlook at a site that is on the disk, or None."""
        file = outlook_stage(self.work).folder / outlook_file(site, q_bits)
        return load_outlook(file, self.work.problem.form.codebook) if file.is_file() else None

    def looking(self, site: Site) -> Looking:
        """What a fit at a site may look at: what is on the disk, and without a Q what is not, too."""

        def look(q_bits: int) -> Outlook | None:
            known = self.looked(site, q_bits)
            return self.look(site, 0) if known is None and not q_bits else known

        return look

    def look(self, site: Site, q_bits: int) -> Outlook:
        """What the method sees in a weight beside a Q of so many bits.

        Raises:
            NotFiniteError: naming the site.
        """
        work = self.dense()
        if site.parameters >= _LARGE:
            give_back_memory()

        def make(device: torch.device) -> Outlook:
            weight, seen = weight_and_statistics(work, self.store, site, device)
            with naming(site):
                return work.recipe.method.outlook(weight, seen, q_bits, draw_for(work, site))

        outlook = on_gpu_or_cpu(work, site, make)
        outlook.basis.check_finite(site.name)
        return outlook

    def objective(self, samples: Tensor) -> Objective:
        """The objective of a search on these samples; the model is ready for cuts until `close`."""
        if self._objective is None:

            def looked(site: Site, q_bits: int) -> Outlook:
                found = self.looked(site, q_bits)
                assert found is not None, f"{site.name}: nothing was looked at beside {q_bits} bits"
                return found

            self._objective = self._judging.enter_context(judging(self.work, looked, samples))
        return self._objective

    def close(self) -> None:
        """Leave the model as it was."""
        self._objective = None
        self._judging.close()


def open_hand(
    root: Path,
    number: int,
    reporter: Reporter,
    *,
    recipe: Mapping[str, Any],
    texts: Texts,
    memory: str,
    fingerprint: str,
) -> Hand:
    """What a worker begins with: it loads the model itself.

    Args:
        root: the run directory, as it is here.
        number: of the worker.
        reporter: told what is to be known.
        recipe: the whole run, as plain values.
        texts: its token sequences.
        memory: the way the model is held.
        fingerprint: of its weights.

    Raises:
        ModelError: when the model here is another one.
    """
    asked = recipe_from(recipe)
    files = root / f"{SCRATCH}weights-{number}" if memory in ("blocks", "disk") else None
    if files is not None:
        files.mkdir(exist_ok=True)
    loaded = load_model(
        asked.model,
        precision=asked.precision,
        device=named_device(asked.device),
        trust_remote_code=asked.trust_remote_code,
        files=files,
    )
    work = begin(asked, Run(root, reporter), loaded, texts, reporter, memory)
    if work.fingerprint != fingerprint:
        raise ModelError(
            "A worker found other weights under the model's name.",
            where=asked.model,
            remedy="give a directory that all machines share, or put the same files on each",
        )
    return Hand(work)


def measure_shard(hand: Hand, out: Path, *, numbers: list[int], first: int, stop: int) -> None:
    """Statistics of some sequences: a file `NUMBER/STREAM.safetensors` for each.

    Args:
        hand: the run.
        out: where files go.
        numbers: which of `requests_of`.
        first: first sequence.
        stop: the one behind the last.

    Raises:
        NotFiniteError: naming the layer.
    """
    work, ids = hand.dense(), hand.work.texts.calibration.ids
    asked = requests_of(work)
    missing = [asked[number] for number in numbers]
    of = {statistic: place for place, statistic in enumerate(missing)}
    key = {"sequences": [first, stop], "statistics": [s.settings() for s in missing]}
    snapshot = work.stage("snapshot", {**calibration_key(work), **chosen_key(work), **key})
    found = collecting(
        work.loaded.model,
        watched(work.sites, work.left_out),
        ids[first:stop],
        missing,
        batch_size=work.recipe.calibration.batch_size,
        seed=work.recipe.seed,
        snapshot=snapshot.partial,
        hidden_gb=0.0 if work.memory == "disk" else HIDDEN_GB,
        reporter=work.reporter,
        first=first,
        of=len(ids),
        gradient_sequences=work.gradient_sequences,
    )
    for statistic, stream, totals in found:
        save_totals(out / str(of[statistic]) / f"{stream}.safetensors", totals)
    snapshot.discard()


def estimate_losses(hand: Hand, out: Path, *, site: str) -> None:
    """The losses that the method estimates without codes; that there are none, too: a file `SITE.losses.json`.

    Raises:
        NotFiniteError: naming the site.
        RankwiseError: when the method answers other bits than it was asked for.
    """
    work, place = hand.dense(), hand.site(site)
    choices = work.problem.candidates[site].choices

    def estimate(device: torch.device) -> Mapping[int, float]:
        weight, seen = weight_and_statistics(work, hand.store, place, device)
        with naming(place):
            return work.recipe.method.estimates(weight, seen, choices, draw_for(work, place))

    losses = on_gpu_or_cpu(work, place, estimate)
    if not all(map(math.isfinite, losses.values())):
        raise NotFiniteError(
            "An estimated loss is not finite.",
            where=site,
            remedy="--set precision=float32 if the model overflows in half precision",
        )
    if losses and set(losses) != set(choices):
        raise RankwiseError(
            f"{work.recipe.method.label} estimates losses of {sorted(losses)} bits, asked for {sorted(choices)}.",
            where=site,
            remedy="estimates gives a loss for every choice, or nothing",
        )
    (out / f"{site}.losses.json").write_text(json.dumps({str(q_bits): loss for q_bits, loss in losses.items()}))


def look_at(hand: Hand, out: Path, *, site: str, q_bits: int, with_basis: bool) -> None:
    """An outlook, as a file.

    Args:
        hand: the run.
        out: where it goes.
        site: name.
        q_bits: of Q, 0 for none.
        with_basis: whether a basis beside Q is kept: for a search alone.

    Raises:
        NotFiniteError: naming the site.
    """
    place = hand.site(site)
    outlook = hand.look(place, q_bits)
    # Without a Q the basis is what fits are sliced from.
    most = min(place.m, place.n)
    if q_bits:
        most = hand.work.problem.candidates[site].with_ranks(q_bits) if with_basis else 0
    save_outlook(out / outlook_file(place, q_bits), outlook, most)


def fit_site(hand: Hand, place: Site, cut: Cut) -> tuple[Factors, dict[str, Any]]:
    """The factors of a site and what its fit says of itself.

    Raises:
        NotFiniteError: naming the site.
    """
    work = hand.dense()

    def fit_on(device: torch.device) -> tuple[Factors, Fit]:
        weight, seen = weight_and_statistics(work, hand.store, place, device)
        with naming(place):
            return work.recipe.method.fit(weight, seen, cut, draw_for(work, place), hand.looking(place))

    # A cut that is not coded is a slice of a basis.
    factors, fit = on_gpu_or_cpu(work, place, fit_on) if cut.coded else fit_on(torch.device("cpu"))
    fit.check_finite(place.name)
    return factors, fit.facts()


def fit_codes(hand: Hand, out: Path, *, sites: list[tuple[str, list[int | None], str]]) -> None:
    """Codes of sites that are fitted together: of each its factors, and in a second file what the fit says of itself.

    Args:
        hand: the run.
        out: where they go.
        sites: of each its name; rank, bits of Q, bits of L and R; name of the first file.
    """
    wanted = [(hand.site(name), Cut(rank, q_bits or 0, lr_bits)) for name, (rank, q_bits, lr_bits), _ in sites]
    for (_, _, file), (factors, facts) in zip(sites, _fit_together(hand, wanted), strict=True):
        (out / f"{file}.json").write_text(json.dumps(facts))
        save_factors(out / file, factors)


def _fit_together(hand: Hand, wanted: Sequence[tuple[Site, Cut]]) -> list[tuple[Factors, dict[str, Any]]]:
    """What `fit_site` gives at each."""
    work = hand.dense()
    device, alone = work.loaded.model.device, len(wanted) == 1
    if not alone:
        try:
            given = []
            for place, cut in wanted:
                weight, seen = weight_and_statistics(work, hand.store, place, device)
                given.append(AtSite(weight, seen, cut, draw_for(work, place), hand.looking(place)))
            found = work.recipe.method.fit_together(given)
        except (RuntimeError, ValueError, NotFiniteError):
            alone = True
    if alone:
        # One by one it is told which fails, and what a GPU cannot do the CPU may. What the group held is let go here.
        given = []
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return [fit_site(hand, place, cut) for place, cut in wanted]
    for (place, _), (_, fit) in zip(wanted, found, strict=True):
        fit.check_finite(place.name)
    return [(factors, fit.facts()) for factors, fit in found]


def judge_cuts(
    hand: Hand, out: Path, *, cuts: Mapping[str, list[int | None]] | None, samples: Tensor
) -> tuple[tuple[float, float, float] | None, dict[str, Any]]:
    """What a plan scores, and what the objective says of itself.

    Args:
        hand: the run.
        out: nothing is written.
        cuts: by site name: rank, bits of Q, bits of L and R; None judges nothing.
        samples: validation samples, shape `[samples, length]`.
    """
    objective = hand.objective(samples)
    found = None
    if cuts is not None:
        found = objective({name: Cut(rank, q_bits or 0, lr_bits) for name, (rank, q_bits, lr_bits) in cuts.items()})
    return found, {
        "dense_nll": objective.dense_nll,
        "form": objective.predictions_form,
        "bytes": objective.predictions_bytes,
        "largest_share_of_kl_missed": objective.kl_error,
        "bare_forward": objective.bare_seconds,
    }
