"""Statistics on disk, and what a method sees of them at one site."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.linalg import InputMetric
from rankwise.models import Site
from rankwise.statistics.curvature import Curvature, RowFisher
from rankwise.statistics.moments import AbsoluteMean, Moments, PooledMoments
from rankwise.statistics.needs import Need

Record = Any
Records = dict[Need, dict[str, Record]]

_TYPES: dict[Need, Any] = {
    Need.MOMENTS: Moments,
    Need.INPUT_MOMENTS: Moments,
    Need.POOLED_MOMENTS: PooledMoments,
    Need.ABSOLUTE_MEAN: AbsoluteMean,
    Need.ROW_FISHER: RowFisher,
    Need.CURVATURE: Curvature,
}


def save_record(path: Path, record: Record) -> None:
    """Write one record as safetensors; its counts become tensors of one integer."""
    parts = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    tensors = {k: v.contiguous() if isinstance(v, Tensor) else torch.tensor([v]) for k, v in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def load_record(path: Path, need: Need) -> Record:
    """Read what `save_record` wrote."""
    tensors = load_file(path)
    counts = {name: int(value) for name, value in tensors.items() if value.dtype == torch.int64}
    return _TYPES[need](**{**tensors, **counts})


def save_records(folder: Path, records: Records, done: int) -> None:
    """Replace the snapshot in `folder`, atomically."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for need, by_stream in records.items():
        for key, record in by_stream.items():
            save_record(fresh / need / f"{key}.safetensors", record)
    (fresh / "done.json").write_text(json.dumps({"sequences": done}))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_records(folder: Path) -> tuple[Records, int]:
    """Read a snapshot: the records and how many sequences they cover."""
    records: Records = {
        Need(sub.name): {p.name.removesuffix(".safetensors"): load_record(p, Need(sub.name)) for p in sub.iterdir()}
        for sub in folder.iterdir()
        if sub.is_dir()
    }
    return records, int(json.loads((folder / "done.json").read_text())["sequences"])


class Store:
    """Finished statistics by need and site. Holds the last input metric, which the sites of one group share.

    Args:
        folders: need -> the folder with one file a stream.
        stream_of: need -> site name -> stream key.
    """

    def __init__(self, folders: Mapping[Need, Path], stream_of: Mapping[Need, Mapping[str, str]]) -> None:
        self._folders = folders
        self._stream_of = stream_of
        self._last: tuple[tuple[Need, str, str], InputMetric] | None = None

    def record(self, need: Need, site: Site) -> tuple[str, Record]:
        """The stream's key and its record.

        Raises:
            KeyError: when the need was not collected.
        """
        key = self._stream_of[need][site.name]
        return key, load_record(self._folders[need] / f"{key}.safetensors", need)

    def input_metric(self, need: Need, kind: str, key: str, matrix: Tensor) -> InputMetric:
        """The metric with this matrix; the same object, root and all, when the last call was for the same stream."""
        label = (need, kind, key)
        if self._last is None or self._last[0] != label:
            self._last = (label, InputMetric(matrix))
        return self._last[1]


@dataclasses.dataclass(frozen=True)
class Response:
    """A second moment as a decomposition takes it: of inputs, or of W x itself.

    Attributes:
        mean_output: E[W x], shape `[m]`, float64.
        inputs: metric on inputs, or None when outputs were watched.
        outputs: second moment of W x, shape `[m, m]`, or None when inputs were watched.
    """

    mean_output: Tensor
    inputs: InputMetric | None
    outputs: Tensor | None


class SiteStatistics:
    """What a method sees of the statistics, at one site.

    Args:
        site: which.
        weight: W, shape `[m, n]`, float64.
        bias: the layer's own bias, shape `[m]`, or None.
        store: where the records are.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None, store: Store) -> None:
        self._site, self._weight, self._bias, self._store = site, weight, bias, store

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, shape `[m]`, or None."""
        return self._bias

    def _response(self, need: Need, kind: str) -> Response:
        key, record = self._store.record(need, self._site)
        mean = record.mean() if need is Need.POOLED_MOMENTS else record.mean
        if key.endswith(".input"):
            matrix = record.covariance() if kind == "covariance" else record.second_moment()
            return Response(self._weight @ mean, self._store.input_metric(need, kind, key, matrix), None)
        # An output is W x + b: its covariance is that of W x, its mean is off by b.
        if self._bias is not None:
            mean = mean - self._bias.double()
        if kind == "covariance":
            return Response(mean, None, record.covariance())
        return Response(mean, None, Moments(record.count, mean, record.scatter).second_moment())

    def covariance(self) -> Response:
        """Sample covariance over all tokens."""
        return self._response(Need.MOMENTS, "covariance")

    def pooled_covariance(self) -> Response:
        """Mean of the groups' sample covariances (Bolaco, Eq. 4)."""
        return self._response(Need.POOLED_MOMENTS, "covariance")

    def second_moment(self) -> Response:
        """E[x x^T] over all tokens, not centred."""
        return self._response(Need.MOMENTS, "second moment")

    def input_second_moment(self) -> Tensor:
        """E[x x^T] of the input over all tokens, shape `[n, n]`."""
        value: Tensor = self._store.record(Need.INPUT_MOMENTS, self._site)[1].second_moment()
        return value

    def absolute_mean(self) -> Tensor:
        """E|x| of every input, shape `[n]`."""
        value: Tensor = self._store.record(Need.ABSOLUTE_MEAN, self._site)[1].value()
        return value

    def row_fisher(self) -> Tensor:
        """Squared gradient summed over each row, mean over sequences, shape `[m]`."""
        value: Tensor = self._store.record(Need.ROW_FISHER, self._site)[1].value()
        return value

    def curvature(self) -> Tensor:
        """E[g g^T] in diagonal blocks, shape `[k, b, b]`."""
        value: Tensor = self._store.record(Need.CURVATURE, self._site)[1].value()
        return value
