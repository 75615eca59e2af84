"""Plans of the random campaign: which faults hit which start of a run, what must not come of it, the shortest that shows it."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hooks import quick_failure_detection
from server import Ended
from trials import Job, Trials

from bpt_dist.errors import StorageError
from bpt_dist.storage import checkpoint

MAX_FAULTS, MAX_STARTS = 3, 6  # the first start and five restarts
CODES = {"kill": -9, "stop": -9, "term": 75, "raise": 70, "enospc": 74, "nan": 77}
"""How the rank that a fault hits may end; `stop` is a rank that the leader kills once the others are gone."""

SECTIONS = {
    "data": {"target_tasks": ["mood"]},
    "source": {"steps": 4, "checkpoint_every": 2},
    "target": {"steps": 3, "checkpoint_every": 2},
    "distribution": {"startup_timeout": 20, "step_timeout": 3},
}
STEPS = [("source", step) for step in range(4)] + [("target/mood", step) for step in range(3)]
SAVED = [("source", 2), ("source", 4), ("target/mood", 2), ("target/mood", 3)]


@dataclass(frozen=True)
class Plan:
    """`sizes[i]` ranks in start i; `faults` are (start, BPT_FAULT entry) or (start, `flip:<share>`): a bit on disk after it."""

    sizes: tuple[int, ...]
    faults: tuple[tuple[int, str], ...]
    exact: bool = False

    def save(self, path: Path) -> None:
        """Write the plan as a case that the tests replay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a stored case."""
        plain = json.loads(path.read_text())
        return cls(tuple(plain["sizes"]), tuple((start, fault) for start, fault in plain["faults"]), plain["exact"])


def draw(rng: random.Random, *, exact: bool) -> Plan:
    """Return a random plan; with `exact` every start has its own number of ranks."""
    num_faults = rng.randint(1, MAX_FAULTS)
    size = rng.choice((1, 2, 2, 2, 3))
    sizes = tuple(rng.choice((1, 2, 3)) if exact else size for _ in range(MAX_STARTS))
    # Usually one fault a start; sometimes two in one, of which the second may never be reached.
    starts = sorted(rng.choice(range(num_faults)) for _ in range(num_faults))
    return Plan(sizes, tuple((start, _fault(rng, sizes[start])) for start in starts), exact)


def _fault(rng: random.Random, size: int) -> str:
    if rng.random() < 0.06:
        return f"flip:{rng.random():.6f}"
    kind = rng.choices(("step", "save", "evaluation", "opening", "ending"), (5, 4, 2, 2, 3))[0]
    rank = rng.randrange(size)
    if kind == "step":
        stage, step = rng.choice(STEPS)
        point = rng.choice(("step.before_forward", "step.after_backward", "step.before_update", "step.after_update"))
        where = f"{point},stage={stage},step={step + (point == 'step.after_update')}"
        if point == "step.after_backward" and rng.random() < 0.3:
            return f"{where},rank={rank},nan"
    elif kind == "save":
        rank, (stage, step) = 0, rng.choice(SAVED)
        point = rng.choice(("ckpt.before_write", "ckpt.before_rename", "ckpt.after_rename", "ckpt.after_delete", "metrics"))
        where = f"metrics.before_append,stage={stage},step={step}" if point == "metrics" else f"{point},step={step}"
        if point in ("ckpt.before_write", "ckpt.before_rename", "metrics") and rng.random() < 0.3:
            return f"{where},enospc"
    elif kind == "evaluation":
        where = f"eval.batch,hit={rng.randint(1, 4)}"
    elif kind == "opening":
        rank, where = rng.choice(
            [
                (rank, f"data.row,hit={rng.randint(1, 60)}"),
                (rank, "backbone.loaded"),
                (0, "run.opened"),
                (0, "status.before_write,hit=1"),
            ]
        )
    else:
        rank, where = rng.choice(
            [(rank, "stage.finished,stage=source"), (rank, "stage.finished,stage=target/mood"), (0, "posterior.before_write"),
             (0, "export.before_write"), (0, "results.before_write"), (0, "status.before_write,state=finished")]
        )  # fmt: skip
    action = rng.choices(("kill", "term", "raise", "stop", "sleep:0.3"), (10, 3, 1, 0.5 if size > 1 else 0, 1))[0]
    return f"{where},rank={rank},{action}"


class Wrong(AssertionError):
    """Something that must never happen; `kind` is what the campaign counts."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass
class Outcome:
    """What a trial did: starts it took and the longest wait of survivors for the end."""

    starts: int = 0
    notice: float = 0.0


def carry_out(plan: Plan, trials: Trials) -> Outcome:
    """Run a plan to its end and remove what it wrote. Raises Wrong."""
    sections = {**SECTIONS, "distribution": {**SECTIONS["distribution"], "exact": True}} if plan.exact else SECTIONS
    job = trials.job(**sections)
    try:
        return _carry_out(plan, trials, job, sections)
    finally:
        shutil.rmtree(job.folder)


def _carry_out(plan: Plan, trials: Trials, job: Job, sections: dict[str, Any]) -> Outcome:
    outcome = Outcome()
    last = max(start for start, _ in plan.faults)
    for number in range(MAX_STARTS):
        here = [fault for start, fault in plan.faults if start == number]
        ended = _start(job, ";".join(fault for fault in here if not fault.startswith("flip")), plan.sizes[number])
        outcome.starts += 1
        if ended.stopped or any(ended.codes):
            outcome.notice = max(outcome.notice, ended.notice)
        _check_codes(ended, here)
        if all(code == 0 for code in ended.codes):
            break
        for fault in here:
            if fault.startswith("flip"):
                _flip(job.directory, float(fault.partition(":")[2]))
        if number > last:
            raise Wrong("unfinished", f"an undisturbed start ended with {ended.codes}:\n{ended.screen[-2000:]}")
    if job.status.state != "finished":
        raise Wrong("false success", str(job.status))
    try:
        trials.assert_as_undisturbed(job, 1 if plan.exact else plan.sizes[0], **sections)
    except AssertionError as error:
        raise Wrong("mismatch", str(error)[:2000]) from error
    return outcome


def _start(job: Job, fault: str, size: int) -> Ended:
    try:
        return job.start(fault, size, prepare=quick_failure_detection)
    except AssertionError as error:
        text = str(error)
        kind = "unsound"
        if "timed_out" in text:
            kind = "hang"
        elif "survivors" in text:
            kind = "orphan"
        raise Wrong(kind, f"{fault} on {size}: {text[:3000]}") from error


def _check_codes(ended: Ended, faults: list[str]) -> None:
    actions = [fault.rpartition(",")[2] for fault in faults]
    allowed = {0, 69, *(CODES[action] for action in actions if action in CODES)}
    if not set(ended.codes) <= allowed:
        raise Wrong("exit code", f"{ended.codes} after {faults}:\n{ended.screen[-3000:]}")


def _flip(run: Path, share: float) -> None:
    """Flip one bit of the newest checkpoint of the stage that was trained last, where an older one can take its place."""
    # The checkpoints of a finished stage are not read again.
    finished = {run / "source"} if (run / "source" / "posterior" / "posterior.json").exists() else set()
    finished |= {file.parent for file in run.glob("target/*/result.json")}
    folders = [folder for folder in run.rglob("checkpoints") if _num_intact(folder) > 1 and folder.parent not in finished]
    if not folders:
        return
    folder = max(folders, key=lambda path: path.stat().st_mtime_ns)
    newest = checkpoint.latest(folder, fingerprint=None, warn=print)
    assert newest is not None
    files = sorted(newest.path.iterdir())
    file = files[int(share * len(files))]
    data = bytearray(file.read_bytes())
    place = int(share * 1e6) % len(data)
    data[place] ^= 1 << (place % 8)
    file.write_bytes(data)
    found = checkpoint.latest(folder, fingerprint=None, warn=lambda _: None)
    if found is not None and found.step == newest.step:
        raise Wrong("torn accepted", f"{file}: bit {place % 8} of byte {place}")


def _num_intact(folder: Path) -> int:
    """Count the checkpoints a start could resume from; leftovers of a killed save and torn ones are none."""
    intact = 0
    for path in folder.glob("step-*"):
        with suppress(StorageError):
            found = checkpoint.at(folder, int(path.name.removeprefix("step-"))) if path.name[5:].isdecimal() else None
            intact += found is not None and bool(checkpoint.load(found))
    return intact


def shrink(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """Return a shortest part of `plan` that still fails: fewer faults, then fewer ranks."""
    shorter = True
    while shorter:
        shorter = False
        for index in range(len(plan.faults)):
            rest = plan.faults[:index] + plan.faults[index + 1 :]
            if rest and fails(candidate := replace(plan, faults=rest)):
                plan, shorter = candidate, True
                break
    ranks_named = [int(found) + 1 for _, fault in plan.faults for found in re.findall(r"rank=(\d+)", fault)]
    for size in range(max([1, *ranks_named]), max(plan.sizes)):
        candidate = replace(plan, sizes=(size,) * MAX_STARTS)
        if fails(candidate):
            return candidate
    return plan
