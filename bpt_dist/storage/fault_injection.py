"""Fault points: named places where a test can make this process fail; inert unless `BPT_FAULT` is set.

`BPT_FAULT="ckpt.before_rename,step=7,rank=1,kill"` kills rank 1 just before the checkpoint of step 7 is
published. Every `key=value` must equal what the fault point is told (`rank` defaults to `$RANK`, else 0);
`hit=2` waits for the second match; `sleep:3` sleeps 3 seconds. Several faults are separated by `;`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

from bpt_dist.errors import ConfigError

POINTS = {
    "run.opened": "rank 0 holds the lock; run.json and status.json are written",
    "data.row": "between two rows while data is read",
    "backbone.loaded": "the frozen backbone is in memory, before it is partitioned",
    "step.before_forward": "the batch of the step is known",
    "step.after_backward": "gradients are summed over the texts, nothing is agreed yet",
    "step.before_update": "gradients are summed, finite and agreed",
    "step.after_update": "particles and optimizer state are those of the next step",
    "metrics.before_append": "a record is about to be written to metrics.jsonl",
    "ckpt.before_write": "nothing of the checkpoint is on disk",
    "ckpt.before_rename": "all files are written and synced, nothing is published",
    "ckpt.after_rename": "the checkpoint is published, older ones still exist",
    "ckpt.after_delete": "older checkpoints are gone",
    "stage.finished": "all steps of a stage are done, its result is not written",
    "posterior.before_write": "the posterior is about to be written",
    "eval.batch": "between two batches of an evaluation",
    "results.before_write": "results.json is about to be written",
    "export.before_write": "a file of an export is about to be written",
    "status.before_write": "status.json is about to be written",
}
ACTIONS = ("kill", "stop", "term", "raise", "sleep", "nan", "enospc")
_hits: Counter[str] = Counter()


class InjectedError(RuntimeError):
    """What the action `raise` raises."""


def fault_point(name: str, **context: object) -> bool:
    """Do what `BPT_FAULT` asks for at this place; true means "poison your tensor" (action `nan`).

    Raises OSError for `enospc` and InjectedError for `raise`.
    """
    assert name in POINTS, name
    text = os.environ.get("BPT_FAULT")
    if not text:
        return False
    context.setdefault("rank", os.environ.get("RANK", "0"))
    poison = False
    for fault in text.split(";"):
        if _due(fault, name, context):
            poison |= _act(fault, name)
    return poison


def _due(fault: str, name: str, context: dict[str, object]) -> bool:
    point, _, rest = fault.strip().partition(",")
    *conditions, action = rest.split(",")
    if point not in POINTS or action.partition(":")[0] not in ACTIONS:
        raise ConfigError(f"BPT_FAULT={fault!r}: write POINT[,key=value...],ACTION with an action of {', '.join(ACTIONS)}")
    wanted = dict(condition.split("=", 1) for condition in conditions)
    hit = wanted.pop("hit", None)
    if point != name or any(str(context.get(key)) != value for key, value in wanted.items()):
        return False
    _hits[fault] += 1
    return hit is None or _hits[fault] == int(hit)


def _act(fault: str, name: str) -> bool:
    action, _, amount = fault.rpartition(",")[2].partition(":")
    if action in ("kill", "stop", "term"):
        os.kill(os.getpid(), getattr(signal, f"SIG{action.upper()}"))
    elif action == "sleep":
        time.sleep(float(amount or 3600))
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "raise":
        raise InjectedError(name)
    return action == "nan"
