"""What every trial of the fault table is judged by: a run ends as if undisturbed, and its directory describes it correctly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from records import repeatable
from safetensors.torch import load_file
from server import Ended

from bpt_dist.storage import checkpoint
from bpt_dist.storage.run_directory import read_status

# What describes the starts of a run and not its result.
OF_STARTS = (
    "run.json",
    "status.json",
    "config.yaml",
    "metrics.jsonl",
    "bad_step.json",
    "run.lock",
    "tracking.json",
    "tracking.lock",
)
STATES = ("created", "running", "stopped", "failed", "finished")


def stage_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run in which something was published."""
    return [
        folder for folder in sorted(run.rglob("checkpoints")) if any(".tmp-" not in path.name for path in folder.glob("step-*"))
    ]


def states(run: Path) -> dict[str, torch.Tensor]:
    """Return particles, other trained tensors and optimizer state of every stage, and what the posterior holds."""
    found = {}
    for folder in stage_folders(run):
        last = checkpoint.latest(folder, fingerprint=None, warn=print)
        assert last is not None, folder
        tensors, _ = checkpoint.load(last)
        found |= {f"{folder.parent.relative_to(run)}/{last.step}/{name}": tensor for name, tensor in tensors.items()}
    for file in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            found |= {f"{file.relative_to(run)}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def final_hash(run: Path) -> str:
    """Return the SHA-256 of `states`: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(states(run).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times and costs; a line that is not JSON raises."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return repeatable(lines)


def other_files(run: Path) -> dict[str, bytes]:
    """Return results, predictions, exports and everything else a finished run leaves."""
    found = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = file.relative_to(run)
        if str(name) not in OF_STARTS and name.parts[0] != "logs" and "checkpoints" not in name.parts:
            found[str(name)] = file.read_bytes()
    return found


def assert_same_run(found: Path, expected: Path) -> None:
    """Assert that two finished runs are the same but for times: particles, optimizer state, metrics, results, exports."""
    for run in (found, expected):
        assert read_status(run).state == "finished", read_status(run)
    ours, theirs = states(found), states(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert final_hash(found) == final_hash(expected)
    assert records(found) == records(expected)
    files, wanted = other_files(found), other_files(expected)
    assert files.keys() == wanted.keys()
    assert [name for name, data in wanted.items() if files[name] != data] == []


def assert_close_run(found: Path, expected: Path, relative: float = 1e-5) -> float:
    """Assert that two finished runs agree to `relative` in every tensor of `states`; return the largest difference."""
    for run in (found, expected):
        assert read_status(run).state == "finished", read_status(run)
    ours, theirs = states(found), states(expected)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, tensor in theirs.items():
        difference = (ours[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        worst = max(worst, float(difference))
        # Second moments are squares: their relative error is twice that of the gradients.
        assert difference <= relative * (2 if "exp_avg_sq" in name else 1), (name, float(difference))
    lines, wanted = records(found), records(expected)
    assert [(line["stage"], line["step"], sorted(line["metrics"])) for line in lines] == [
        (line["stage"], line["step"], sorted(line["metrics"])) for line in wanted
    ]
    return worst


def assert_sound(run: Path, ended: Ended) -> None:
    """Assert what must hold after every start, however it ended."""
    assert not ended.timed_out, ended.screen
    assert ended.survivors == [], ended.screen
    if not (run / "run.json").exists():
        return
    if (run / "status.json").exists():
        assert_true_status(run, ended)
    assert_metrics_in_order(run)
    for folder in stage_folders(run):
        warnings: list[str] = []
        assert checkpoint.latest(folder, fingerprint=None, warn=warnings.append) is not None, warnings


def assert_true_status(run: Path, ended: Ended) -> None:
    """The status names what happened; one that failed or stopped says why and what to do next."""
    status = read_status(run)
    assert status.state in STATES
    if all(code == 0 for code in ended.codes):
        assert status.state == "finished", status
    if status.state in ("failed", "stopped"):
        assert status.reason, status
        assert status.next, status
    if set(ended.codes) == {75}:
        assert status.state == "stopped", status
    if any(0 < code < 128 and code != 75 for code in ended.codes):
        assert status.state != "finished" or 0 in ended.codes, (status, ended.codes)
    if status.state == "finished":
        assert (run / "results.json").is_file()


def assert_metrics_in_order(run: Path) -> None:
    """Each step of each stage is there once, in order, without a gap (the trials record every step)."""
    steps: dict[str, list[int]] = {}
    for record in records(run):
        if any(name.endswith(("/loss", "/skipped")) for name in record["metrics"]):
            steps.setdefault(record["stage"], []).append(record["step"])
    for stage, found in steps.items():
        assert found == list(range(1, len(found) + 1)), (stage, found)
