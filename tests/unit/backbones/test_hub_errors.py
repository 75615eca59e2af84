"""A hub that is silent, breaks off or has an error: one line with the id and the remedy, code 2, from whatever asks for a model."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from huggingface_hub import constants

from bpt_dist import train
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.commands.main import main
from bpt_dist.distributed import hub
from bpt_dist.errors import ConfigError

DEAD = "http://127.0.0.1:1"
REMEDY = "correct the id, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder with config.json"


class BadHub(http.server.BaseHTTPRequestHandler):
    """Answers at its root, and to requests for a file of `owner/<fault>` with that fault."""

    def log_message(self, *_: Any) -> None:
        """Keep the screen of the tests clean."""

    def do_GET(self) -> None:
        fault = self.path.split("/")[2] if self.path.count("/") > 1 else ""
        if fault == "hangs-up":
            return
        self.send_response(503 if fault == "error" else 200)
        if fault == "torn":
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "20")
        self.end_headers()
        if fault == "torn" and self.command == "GET":
            self.wfile.write(b"{")

    do_HEAD = do_GET  # noqa: N815  (the name is that of the library)


@pytest.fixture(scope="module")
def bad_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def ask_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return what lets this process ask at an endpoint, with an empty cache and no waits between retries."""

    def ask(endpoint: str, *, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))  # restored afterwards: a silent hub switches it on
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        hub.reach_hub.cache_clear()

    yield ask
    hub.reach_hub.cache_clear()


@pytest.mark.parametrize("asked", [load, shape_of], ids=["load", "shape"])
@pytest.mark.parametrize("fault", ["hangs-up", "error", "torn", "no-hub"])
def test_a_fault_of_the_hub_is_named_with_id_and_remedy(
    asked: Callable[[str], Any], fault: str, bad_hub: str, ask_at: Callable[..., None]
) -> None:
    """A transport error of the hub's client, which is no OSError, ended with a traceback."""
    ask_at(bad_hub)
    with pytest.raises(ConfigError, match=rf"^backbone\.path: .*'owner/{fault}'.*{REMEDY}") as raised:
        asked(f"owner/{fault}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("offline", [False, True], ids=["dead", "offline"])
def test_plan_and_training_end_with_one_line_and_code_2(
    offline: bool,
    ask_at: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = tiny_run.world(tmp_path)
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, backbone={"path": "owner/model"}, output=str(tmp_path / "runs"))
    config = tiny_run.load(tmp_path, plain)
    ask_at(DEAD, offline=offline)
    assert main(["plan", "-c", str(tmp_path / "config.yaml")]) == 2
    ask_at(DEAD, offline=offline)
    assert train.run_all(config) == 2
    said = capsys.readouterr().err
    named = [line for line in said.splitlines() if "backbone.path" in line]
    assert len(named) == 2
    assert all("'owner/model'" in line and REMEDY in line for line in named)
    assert "Traceback" not in said + caplog.text
