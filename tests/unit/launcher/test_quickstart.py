"""The quick start trains rows side by side, ends with all its processes, names the store its runs wrote, and needs no GPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run

from bpt_dist.commands.tracking import serve_page
from bpt_dist.errors import ConfigError
from bpt_dist.tracking.places import store_uri
from launcher import quickstart


def test_training_the_page_and_the_quick_start_name_one_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.write_tasks(tmp_path / "tasks")
    plain = tiny_run.settings(tmp_path, {"name": "prompt_tuning"}, tracking={"mlflow": True}, seeds=[0, 1])
    config = tiny_run.load(tmp_path, plain)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert {store_uri(run) for run in quickstart.configuration.expand(config)} == {uri}
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert quickstart.report(config) == 0
    assert f"ui --uri {uri}\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"{tmp_path}/runs/mlflow.db: no tracking store"):
        serve_page(None, None, config.output)


@pytest.mark.parametrize(("gpus", "hidden"), [(0, True), (1, True), (2, False), (8, False)])
def test_ranks_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, hidden: bool) -> None:
    started: list[dict[str, str]] = []

    class Job:
        pid = 0
        stdout = (b"a line\n",)

        def __init__(self, _: list[str], env: dict[str, str] | None = None, **__: Any) -> None:
            started.append(env or {})

        def wait(self) -> int:
            return 0

        kill = communicate = wait

    said: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unchanged")
    monkeypatch.setattr(quickstart, "num_gpus", lambda: gpus)
    monkeypatch.setattr(quickstart.subprocess, "Popen", Job)
    assert quickstart.follow(quickstart.launch(["bpt"], said.append), said.append) == 0
    assert started[0]["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "unchanged")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "unchanged"  # the other runs may use a GPU
    assert said[0].endswith("launcher/train.py --config configs/quickstart.yaml --row bpt")
    assert said[1:] == ["a line"]


PROGRAM = """
import sys
from pathlib import Path
from launcher import quickstart
quickstart.CONFIG = Path(sys.argv[1])
sys.exit(quickstart.main())
"""


def small_table(folder: Path, *, shard: str = "none", **target: Any) -> Path:
    """Write a table of two rows and return its file; with `shard` the first has its backbone in parts."""
    world = tiny_run.world(folder)
    prompts: list[dict[str, Any]] = [
        {"label": name, "method": {"name": "prompt_tuning", "length": 3}, "target": {"lr": lr}}
        for name, lr in (("slow", 0.1), ("fast", 0.5))
    ]
    prompts[0]["distribution"] = {"shard": shard}
    plain = tiny_run.settings(world, {"name": "bpt"}, rows=prompts, seeds=[0, 1], target=target)
    plain["comparisons"] = ["fast:slow"]
    tiny_run.load(folder, plain)
    return folder / "config.yaml"


def test_rows_with_a_whole_backbone_need_no_launcher_and_end_in_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "CONFIG", small_table(tmp_path))
    monkeypatch.setattr(quickstart, "launch", lambda *_: pytest.fail("no row shards its backbone"))
    assert quickstart.main() == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"(slow|fast)-s[01] starts on worker [01]$", line)]
    named = [re.match(r"(\w+-s\d) \(prompt_tuning, seed \d\) \|", line) for line in lines]
    assert {match[1] for match in named if match} == {"slow-s0", "slow-s1", "fast-s0", "fast-s1"}
    assert "Compared: 2 seeds, mean of mood, count (accuracy)." in lines
    assert lines.index("Compared: 2 seeds, mean of mood, count (accuracy).") >= len(lines) - 2
    assert (tmp_path / "runs" / "run" / "table.md").read_text().rstrip().endswith("(accuracy).")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize(("number", "shard", "at_once"), [
    (signal.SIGTERM, "none", 2), (signal.SIGINT, "none", 2), (signal.SIGTERM, "deepspeed", 3), (signal.SIGINT, "deepspeed", 3),
])  # fmt: skip
def test_a_signal_ends_every_process_with_a_checkpoint(tmp_path: Path, number: signal.Signals, shard: str, at_once: int) -> None:
    file = small_table(tmp_path, shard=shard, steps=100_000, eval_every=100_000, checkpoint_every=1000, log_every=10)
    job = subprocess.Popen([sys.executable, "-c", PROGRAM, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    stepping: set[str] = set()
    for line in job.stdout:
        stepping |= set(re.findall(r"^(?:\d/\d )?(\w+-s\d) .*step \d+/100000", line))
        if len(stepping) == at_once:  # both workers, and the job of the launcher
            break
    children = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    children += [
        int(pid) for thread in Path(f"/proc/{job.pid}/task").iterdir() for pid in (thread / "children").read_text().split()
    ]
    assert children
    job.send_signal(number)
    rest, _ = job.communicate(timeout=120)
    assert job.returncode == 75
    assert "not finished: " in rest
    assert all(list((tmp_path / "runs" / "run" / name).glob("target/mood/checkpoints/step-*")) for name in stepping)
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if alive(pid)]
