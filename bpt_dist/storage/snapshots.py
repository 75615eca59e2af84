"""Where the particles are at a step: inside the record of metrics.jsonl while they are few, in a file beside it otherwise.

A record of M = 1,024 particles would be a line of 25 MB. More than 16 particles go to `<stage>/particles/step-<n>.safetensors`
[projection M x n, kernel M x M], which the record names; their numbers (`svgd/...`) stay in the record. At most 40 such files are
kept, evenly spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bpt_dist.storage import layout
from bpt_dist.storage.checkpoint import read_tensors, write_tensors_atomic

MOST_INLINE = 16  # particles
MOST_FILES = 40
FILE = "file"  # key of a record's `particles` that names the file, relative to the run directory


def keep_snapshot(run: Path, stage: str, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a record holds of the particles, after their tensors were written to a file where they are many (rank 0).

    Raises StorageError.
    """
    if max(map(len, tensors.values())) <= MOST_INLINE:
        return {name: tensor.tolist() for name, tensor in tensors.items()}
    name = f"{stage}/{layout.PARTICLES}/step-{step:08d}.safetensors"
    write_tensors_atomic(run / name, {key: tensor.float() for key, tensor in tensors.items()})
    _thin_out((run / name).parent)
    return {FILE: name}


def with_snapshots(records: Iterable[Mapping[str, Any]], run: Path) -> Iterator[Mapping[str, Any]]:
    """Yield records with the tensors of the files they name; a record whose file was thinned out has no `particles`."""
    for record in records:
        name = (record.get("particles") or {}).get(FILE)
        if name is None:
            yield record
        elif (run / name).is_file():
            tensors, _ = read_tensors(run / name)
            yield {**record, "particles": {key: tensor.numpy() for key, tensor in tensors.items()}}
        else:
            yield {key: value for key, value in record.items() if key != "particles"}


def _thin_out(folder: Path) -> None:
    """Once there are too many files, keep half of them, evenly spread over the steps; the first and the last stay."""
    files = {int(file.stem.removeprefix("step-")): file for file in folder.glob("step-*.safetensors")}
    if len(files) <= MOST_FILES:
        return
    first, last, num_kept = min(files), max(files), MOST_FILES // 2
    wanted = [first + (last - first) * place / (num_kept - 1) for place in range(num_kept)]
    kept = {min(files, key=lambda step: abs(step - place)) for place in wanted}
    for step in files.keys() - kept:
        files[step].unlink(missing_ok=True)
