"""Fault points do nothing unless asked, and exactly what was asked."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from bpt_dist.errors import ConfigError
from bpt_dist.storage import fault_injection
from bpt_dist.storage.fault_injection import InjectedError, fault_point


@pytest.fixture
def fault(monkeypatch):
    fault_injection._hits.clear()
    monkeypatch.delenv("RANK", raising=False)
    return lambda text: monkeypatch.setenv("BPT_FAULT", text)


def test_inert_by_default(monkeypatch):
    monkeypatch.delenv("BPT_FAULT", raising=False)
    assert not any(fault_point(name, step=1) for name in fault_injection.POINTS)


def test_conditions_must_all_hold(fault, monkeypatch):
    fault("step.after_backward,step=7,rank=1,nan")
    assert not fault_point("step.after_backward", step=7)
    monkeypatch.setenv("RANK", "1")
    assert fault_point("step.after_backward", step=7)
    assert not fault_point("step.after_backward", step=8)
    assert not fault_point("step.before_update", step=7)
    assert not fault_point("step.after_backward"), "a condition on something the place does not know is not met"


def test_hit_counts_matches(fault):
    fault("eval.batch,hit=3,nan;data.row,raise")
    assert [fault_point("eval.batch") for _ in range(4)] == [False, False, True, False]
    with pytest.raises(InjectedError, match=r"data\.row"):
        fault_point("data.row")


def test_a_full_disk(fault):
    fault("ckpt.before_write,enospc")
    with pytest.raises(OSError, match="No space left") as full:
        fault_point("ckpt.before_write", step=1)
    assert full.value.errno == errno.ENOSPC


@pytest.mark.parametrize("text", ["ckpt.before_wrote,kill", "eval.batch,explode", "eval.batch"])
def test_a_misspelt_fault_is_refused(fault, text):
    fault(text)
    with pytest.raises(ConfigError, match="BPT_FAULT"):
        fault_point("eval.batch")


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM)])
def test_signals(action, code):
    script = "from bpt_dist.storage.fault_injection import fault_point; fault_point('run.opened')"
    environment = os.environ | {"BPT_FAULT": f"run.opened,{action}"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == code
