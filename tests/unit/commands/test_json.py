"""Every command that prints facts prints them as data with `--json`: the same facts, and nothing beside them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from bpt_dist.commands import eval as evaluation
from bpt_dist.commands import memory
from bpt_dist.commands.check import hosts, machine
from bpt_dist.commands.check.job import Finding
from bpt_dist.commands.main import app, main
from bpt_dist.tracking import sender
from bpt_dist.tracking.sender import Summary

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
# What they print is no list of facts: files they write, pages they serve, work that goes on; or JSON lines as it is (predict).
OTHERS = {"train", "predict", "serve", "convert", "schema", "run-table", "sweep", "plot", "export", "ui", "example"}


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_commands_that_print_facts_have_the_option() -> None:
    commands = typer.main.get_command(app).commands
    with_option = {name for name, command in commands.items() if any("--json" in p.opts for p in command.params)}
    assert set(commands) - with_option == OTHERS


def test_methods_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"name", "summary", "paper"} <= answer(capsys, "methods")[0].keys()
    (found,) = (task for task in answer(capsys, "tasks") if task["name"] == "cola")
    assert found["metrics"] == ["matthews", "accuracy"]
    assert found["rows_from"] == "nyu-mll/glue cola"


FINDINGS = [Finding("python", "3.12"), Finding("disk", "is full", "free some space")]


@pytest.mark.parametrize("passed", [True, False])
def test_checks(passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    findings = FINDINGS[: 1 if passed else 2]
    monkeypatch.setattr(machine, "_findings", lambda *_: iter(findings))
    monkeypatch.setattr(hosts, "_findings", lambda *_: iter(findings))
    expected = [{"name": "python", "passed": True, "text": "3.12", "remedy": None},
                {"name": "disk", "passed": False, "text": "is full", "remedy": "free some space"}][: len(findings)]  # fmt: skip
    code = 0 if passed else 2
    assert answer(capsys, "check", code=code) == expected
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    assert answer(capsys, "check", "--hostfile", str(tmp_path / "hostfile"), "-c", QUICKSTART, code=code) == expected


def test_an_evaluation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scored = SimpleNamespace(metrics={"accuracy": 75.0, "nll": 0.5}, decode="rank")
    monkeypatch.setattr(evaluation, "evaluate_stored", lambda *_: (scored, 8))
    found = answer(capsys, "eval", str(tmp_path), "-c", QUICKSTART, "--task", "mini_rte")
    assert found == {"task": "mini_rte", "split": "test", "n": 8, "decode": "rank", "metrics": scored.metrics}


def test_what_ranks_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bpt_dist.training.sharding.memory import Share

    share = Share("none", "world", 1, 1, 1000, 1000, 0)
    monkeypatch.setattr(memory, "_measured", lambda *_: share)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (found, *_) = answer(capsys, "memory", "-c", QUICKSTART, "--ranks", "1", "--shard", "none")
    assert found == {**vars(share), "allowed": share.allowed, "kept": True}


def test_what_was_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sender, "sync", lambda _folder: Summary(3, "r", "1", "sqlite:///x.db"))
    assert answer(capsys, "sync", str(tmp_path)) == {"points": 3, "run_id": "r", "experiment_id": "1", "uri": "sqlite:///x.db"}


def test_plan_takes_the_number_of_processes_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [answer(capsys, "plan", "-c", QUICKSTART, "seeds=0", option, "2") for option in ("--world", "--ranks")]
    assert [[one["runs"] for one in plan] for plan in plans] == [[one["runs"] for one in plans[0]]] * 2
    assert all(one["world_size"] == 2 for plan in plans for one in plan)
