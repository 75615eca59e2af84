"""The quick start names the store its runs wrote, and needs no GPU where there are fewer than ranks."""

from __future__ import annotations

import os
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
    started: dict[str, Any] = {}

    class Job:
        pid = 0

        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            started.update(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unchanged")
    monkeypatch.setattr(quickstart, "num_gpus", lambda: gpus)
    monkeypatch.setattr(quickstart.subprocess, "Popen", Job)
    monkeypatch.setattr(quickstart.signal, "signal", lambda *_: None)
    assert quickstart.launch() == 0
    assert started["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "unchanged")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == started["CUDA_VISIBLE_DEVICES"]
