"""`RayCrew`: workers that Ray runs, on this machine or on many.

A worker is an actor that opens what its jobs work on once (it loads the model itself) and is then given job after job.
A worker that dies is replaced, and its job runs again. Where workers see the run directory they read and write there;
where they do not, files go through Ray's object store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise import errors
from rankwise.errors import MissingPackageError, RankwiseError, RunError
from rankwise.progress import Reporter
from rankwise.runs.executor import SCRATCH, SEEN, Crew, Done, Job, function_named, written

_TRIES = 3
"""Workers that may die of one job before it is given up."""

_LOOK_SECONDS = 2.0
"""Between looks at what workers are doing."""

_NO_DEFAULT = 2
"""Workers where there is neither a GPU nor a second machine to count."""


@dataclass(frozen=True)
class Opening:
    """What every worker does first.

    Attributes:
        function: `module:name`, called with the run directory as the worker has it, the worker's number, a reporter,
            and the arguments; what it returns is what the functions of jobs are called with.
        arguments: plain values by name.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class _Worker:
    """What runs in another process.

    Args:
        directory: of the run, as the machine that began it names it.
        token: name of a file in it; who sees that file sees the directory.
        number: of the worker, from 1; one that is replaced hands it on.
    """

    def __init__(self, directory: str, token: str, number: int) -> None:
        self._number = number
        self._reporter = _Heard()
        self._held: Any = None
        shared = (Path(directory) / token).is_file()
        self._root = Path(directory) if shared else Path(tempfile.mkdtemp(prefix="rankwise-"))
        self._shared = shared

    def facts(self) -> dict[str, Any]:
        """Where this is."""
        return {"pid": os.getpid(), "shared": self._shared, "host": os.uname().nodename}

    def said(self) -> str:
        """What it is doing."""
        return self._reporter.heard

    def open(self, opening: Opening) -> dict[str, Any]:
        """Get ready for jobs."""

        def work() -> None:
            self._held = function_named(opening.function)(self._root, self._number, self._reporter, **opening.arguments)

        return self._answer(work)

    def do(self, job: Job, *contents: bytes) -> dict[str, Any]:
        """One job; contents are those of the files it reads, where they come through the object store."""
        for name, content in zip(job.reads, contents, strict=bool(contents)):
            file = self._root / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        out = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._root))

        def work() -> Any:
            return function_named(job.function)(self._held, out, **job.arguments)

        try:
            answer = self._answer(work)
            files = written(out)
            answer["files"] = files if self._shared else {name: path.read_bytes() for name, path in files.items()}
            return answer
        finally:
            if not self._shared:
                shutil.rmtree(out, ignore_errors=True)

    def _answer(self, work: Callable[[], Any]) -> dict[str, Any]:
        """What work returns and what it noted, or the error for people that it raised."""
        before = len(self._reporter.notes)
        try:
            answer = {"value": work()}
        except RankwiseError as problem:
            answer = {"error": (type(problem).__name__, problem.problem, problem.where, problem.remedy)}
        return answer | {"notes": self._reporter.notes[before:]}


class _Heard(Reporter):
    """Keeps what it was told last, for those who ask."""

    def __init__(self) -> None:
        super().__init__(show=False)
        self.heard = ""

    def track(self, items: Iterable[Any], description: str, total: int, done: int = 0) -> Any:
        """Iterate, and keep how far it is."""
        for number, item in enumerate(items, done + 1):
            yield item
            self.heard = f"{self._text or description}, {number} of {total}"
        self.heard = ""


@dataclass(eq=False)
class _Entry:
    """A job on its way."""

    job: Job
    tries: int = 0
    done: Done | None = None


@dataclass(eq=False)
class _Hand:
    """A worker as it is seen from here."""

    actor: Any
    number: int
    shared: bool


class RayCrew(Crew):
    """Workers on Ray.

    Args:
        address: of a cluster; empty for one of this machine's own, begun here and ended with the crew.
        workers: how many; None takes one a GPU where there are GPUs, else one a machine, and two on a single one.
        opening: what each does first.
        directory: of the run.
        reporter: told the notes of workers, how far they are, and which died.

    Raises:
        MissingPackageError: without Ray.
        RunError: when there is no cluster at the address, or workers do not start.
        RankwiseError: as the opening raised it.
    """

    def __init__(
        self, address: str, workers: int | None, opening: Opening, directory: Path, reporter: Reporter
    ) -> None:
        self._ray = _ray()
        self._opening, self._directory, self._reporter = opening, directory.resolve(), reporter
        self._begun = _begin(self._ray, address)
        self._stored: dict[Path, Any] = {}
        self._hands: list[_Hand] = []
        self._token = self._directory / f"{SEEN}{uuid.uuid4().hex}"
        self._mark()
        try:
            resources = self._ray.cluster_resources()
            gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
            machines = sum(bool(node["Alive"]) for node in self._ray.nodes())
            self.workers = workers or gpus or (machines if machines > 1 else _NO_DEFAULT)
            self._each = {"num_cpus": max(1, cpus // self.workers), "num_gpus": min(1.0, gpus / self.workers)}
            if self.workers > cpus:
                raise RunError(
                    f"{self.workers} workers were asked for, and the cluster has {cpus} cores.",
                    where="--workers",
                    remedy=f"use at most {cpus}",
                )
            begun = [self._actor(number) for number in range(1, self.workers + 1)]
            self._hands = [self._open(actor, number) for number, actor in enumerate(begun, 1)]
        except BaseException:
            self.close()
            raise

    def _actor(self, number: int) -> Any:
        """Start a worker, and let it open; its answer is fetched by `_open`."""
        actor = self._ray.remote(_Worker).options(max_concurrency=2, max_restarts=0, **self._each)
        actor = actor.remote(str(self._directory), self._token.name, number)
        return actor, actor.facts.remote(), actor.open.remote(self._opening)

    def _open(self, begun: Any, number: int) -> _Hand:
        actor, facts, opened = begun
        try:
            self._told(self._ray.get(opened))
            return _Hand(actor, number, self._ray.get(facts)["shared"])
        except self._ray.exceptions.RayError as problem:
            raise RunError(
                f"Worker {number} did not start: {_short(problem)}.",
                where="ray",
                remedy="see that rankwise and the model are there on every machine of the cluster, and memory for it",
            ) from None

    def _mark(self) -> None:
        """Leave a file that those see who see the directory."""
        self._token.touch()

    def pids(self) -> list[int]:
        """Processes of the workers, where they run on this machine."""
        return [self._ray.get(hand.actor.facts.remote())["pid"] for hand in self._hands]

    def results(self, jobs: Iterable[Job], ahead: int | None = None) -> Iterator[Done]:
        line: deque[_Entry] = deque()
        again: deque[_Entry] = deque()
        running: dict[Any, tuple[_Hand, _Entry]] = {}
        more, source = True, iter(jobs)
        ahead = max(self.workers, ahead or 0)
        try:
            while True:
                busy = {hand.number for hand, _ in running.values()}
                for hand in (each for each in self._hands if each.number not in busy):
                    if not again and more and len(line) < ahead:
                        job = next(source, None)
                        more = job is not None
                        if job is not None:
                            line.append(_Entry(job))
                            again.append(line[-1])
                    if again:
                        entry = again.popleft()
                        running[hand.actor.do.remote(entry.job, *self._contents(hand, entry.job))] = (hand, entry)
                if not line:
                    return
                if line[0].done is None:
                    again.extend(self._wait(running))
                while line and line[0].done is not None:
                    yield line.popleft().done  # type: ignore[misc]
        finally:
            for reference in running:
                self._ray.cancel(reference, force=False)

    def _wait(self, running: dict[Any, tuple[_Hand, _Entry]]) -> list[_Entry]:
        """Wait for a job; returns those whose workers died, to be done again."""
        ready, _ = self._ray.wait(list(running), timeout=_LOOK_SECONDS)
        if not ready:
            self._look([hand for hand, _ in running.values()])
            return []
        hand, entry = running.pop(ready[0])
        try:
            answer = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as problem:
            # What nobody foresaw in a job is what it would be here: for the one boundary of the command line.
            raise problem.as_instanceof_cause() from None
        except self._ray.exceptions.RayError as problem:
            return [self._replace(hand, entry, problem)]
        self._told(answer)
        entry.done = Done(answer["value"], answer["files"])
        return []

    def _replace(self, hand: _Hand, entry: _Entry, problem: Exception) -> _Entry:
        """Another worker for one that died, and its job once more."""
        entry.tries += 1
        if entry.tries >= _TRIES:
            raise RunError(
                f"{entry.tries} workers died of one job ({entry.job.label or entry.job.function}): {_short(problem)}.",
                where="ray",
                remedy="see the memory of the machines, and use fewer --workers; what is finished is kept",
            )
        self._reporter.note(f"worker {hand.number} died and was replaced; its job runs again", passing=True)
        self._hands[self._hands.index(hand)] = self._open(self._actor(hand.number), hand.number)
        return entry

    def _look(self, hands: list[_Hand]) -> None:
        """Show what workers are doing."""
        asked = [hand.actor.said.remote() for hand in hands]
        ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=_LOOK_SECONDS)
        said = []
        for hand, reference in zip(hands, asked, strict=True):
            if reference in ready:
                try:
                    heard = self._ray.get(reference)
                except self._ray.exceptions.RayError:
                    continue
                if heard:
                    said.append(f"worker {hand.number}: {heard}")
        if said:
            self._reporter.beside("; ".join(said))

    def _contents(self, hand: _Hand, job: Job) -> list[Any]:
        """References to the contents of the files that a job reads, for a worker that does not see them."""
        if hand.shared:
            return []
        for path in job.reads:
            if path not in self._stored:
                self._stored[path] = self._ray.put((self._directory / path).read_bytes())
        return [self._stored[path] for path in job.reads]

    def _told(self, answer: Mapping[str, Any]) -> None:
        """Say what a worker noted, and raise what it raised."""
        for note in answer["notes"]:
            self._reporter.note(note)
        if "error" in answer:
            name, problem, where, remedy = answer["error"]
            raise getattr(errors, name, RankwiseError)(problem, where=where, remedy=remedy)

    def close(self) -> None:
        for hand in self._hands:
            self._ray.kill(hand.actor)
        self._hands = []
        self._stored.clear()
        self._token.unlink(missing_ok=True)
        if self._begun:
            self._ray.shutdown()


def _short(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[-1] if lines else type(problem).__name__)[:200].rstrip(".")


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingPackageError(
            "Workers need Ray.", where="--executor", remedy="pip install 'rankwise[ray]'"
        ) from None
    import ray.exceptions

    return ray


def _begin(ray: Any, address: str) -> bool:
    """Join a cluster, or begin one of this machine; whether that was done here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as problem:
        raise RunError(
            f"Ray does not start: {_short(problem)}.",
            where=f"--executor ray:{address}" if address else "--executor ray",
            remedy="give the address of a cluster (ray start --head prints it)" if address else "try ray start --head",
        ) from None
    return True
