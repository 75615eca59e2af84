"""A hub that does not answer is asked once; with a question for each file, a run without a network waited for minutes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from bpt_dist.backbones.loading import load
from bpt_dist.data.published import open_hub
from bpt_dist.distributed.hub import reach_hub
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.tasks.catalogue import TASKS

PROGRAM = """
import sys
from pathlib import Path
from bpt_dist.backbones.loading import load
from bpt_dist.data.published import open_hub
from bpt_dist.distributed.hub import reach_hub
from bpt_dist.errors import UserError
from bpt_dist.tasks.catalogue import TASKS
for name in ("rte", "boolq"):
    try:
        open_hub(TASKS[name], ("train", "validation"), Path(sys.argv[1]))
    except UserError as error:
        print(type(error).__name__, str(error)[:60])
try:
    load("owner/model")
except UserError as error:
    print(type(error).__name__, error)
print(reach_hub())
"""


class SilentHub:
    """Accepts connections, counts them and hangs up."""

    def __enter__(self) -> SilentHub:
        self.asked = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._count, daemon=True).start()
        return self

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.asked += 1
            connection.close()

    def __exit__(self, *_: object) -> None:
        self.listener.close()


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    with SilentHub() as hub:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
        variables |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")], capture_output=True, text=True, env=variables, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["DataError", "DataError", "ConfigError", "False"]
        assert hub.asked == 1, (time.monotonic() - began, done.stderr)
        assert done.stderr.count("does not answer") == 1


def test_a_process_that_was_started_offline_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    for module, names in ((constants, ("HF_HUB_OFFLINE",)), (datasets.config, ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))):
        for name in names:
            monkeypatch.setattr(module, name, True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with SilentHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
        reach_hub.cache_clear()
        with pytest.raises(DataError, match="could not load"):
            open_hub(TASKS["rte"], ("train",), tmp_path / "cache")
        with pytest.raises(ConfigError, match="'owner/model'"):
            load("owner/model")
        assert not reach_hub()
        assert hub.asked == 0
    reach_hub.cache_clear()
    assert "does not answer" not in caplog.text
