"""A sweep is handed only to a Ray that asks for a token, without a secret in the command or its environment."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest
import tiny_sweep

from bpt_dist.commands.sweep import cluster as sweep_cluster
from bpt_dist.commands.sweep import submit
from bpt_dist.commands.sweep.run import sweep as run_command
from bpt_dist.commands.sweep.settings import load
from bpt_dist.errors import ConfigError, StorageError

CONFIG = Path(__file__).parents[4] / "configs" / "sweep" / "sigma_lr.yaml"


@pytest.fixture(autouse=True)
def without_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))


@pytest.mark.parametrize("address", ["cluster:8265", "ray://10.0.0.1:10001", "", "http://"])
def test_an_odd_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a Ray dashboard"):
        submit.check_address(address)


def test_another_host_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    submit.check_address("http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        submit.check_address("http://10.0.0.1:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="auth_token"):
        submit.check_address("http://10.0.0.1:8265")
    (tmp_path / "token").write_text("0" * 64)
    submit.check_address("http://10.0.0.1:8265")


def test_credentials_in_an_address_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        submit.check_address("http://me:canary-9271@10.0.0.1:8265")
    assert "canary" not in str(caught.value)


def test_the_job_finds_its_files_from_another_folder() -> None:
    sweep = load(CONFIG, ["concurrency=1"])
    words = submit.command(sweep, CONFIG, ["concurrency=1"], resume=True).split()
    assert words[:4] == ["python", "launcher/sweep.py", "--config", "configs/sweep/sigma_lr.yaml"]
    assert words[-1] == "--resume"
    given = dict(word.split("=") for word in words[4:-1])
    assert given["concurrency"] == "1"
    assert Path(given["output"]).is_absolute()
    assert Path(given["source.posterior"]) == Path("runs/quickstart/bpt-s0").resolve()
    again = load(CONFIG, words[4:-1])
    assert again.settings.run["source"]["posterior"] == given["source.posterior"]


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no Ray answers at http://127\.0\.0\.1:9"):
        run_command(CONFIG, [], resume=False, submit="http://127.0.0.1:9", follow=False)


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers, but not as a Ray does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path.endswith("version") and "odd" in type(self).__name__ else 404)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("name", ["missing", "odd"])
def test_somebody_else_answers(name: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), type(name, (Stranger,), {})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(StorageError, match=f"no Ray answers at {address} .*is the cluster up"):
            run_command(CONFIG, [], resume=False, submit=address, follow=False)
        server.shutdown()


def test_a_ray_that_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(tiny_sweep.write(tmp_path, tiny_sweep.plain(tmp_path))).settings
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "nothing-9271.invalid:9"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS: no Ray can be joined at {address} .*start it, or unset RAY_ADDRESS"):  # noqa: SIM117
            with sweep_cluster.cluster(settings, tmp_path):
                pass


def test_a_config_outside_the_checkout_does_not_travel(tmp_path: Path) -> None:
    file = tiny_sweep.write(tmp_path, tiny_sweep.plain(tmp_path))
    with pytest.raises(ConfigError, match="is outside"):
        run_command(file, [], resume=False, submit="http://127.0.0.1:9", follow=False)


def test_follow_needs_submit() -> None:
    with pytest.raises(ConfigError, match="--follow: has no effect without --submit"):
        run_command(CONFIG, [], resume=False, submit=None, follow=True)


def test_a_trial_that_fits_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    settings = load(tiny_sweep.write(tmp_path, tiny_sweep.plain(tmp_path))).settings
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}]
    assert sweep_cluster.fitting(settings, nodes).concurrency == 4  # a whole GPU each, two on a node
    half = settings.model_copy(update={"gpus": 0.5, "cpus": 2.0})
    assert sweep_cluster.fitting(half, nodes).concurrency == 4
    wide = settings.model_copy(update={"workers": 3, "stage": "source"})
    assert sweep_cluster.fitting(wide, nodes).concurrency == 1
    with pytest.raises(ConfigError, match=r"one trial needs 1 process\(es\) with cpus 8 and gpus 0 each, and 2 node\(s\)"):
        sweep_cluster.fitting(settings.model_copy(update={"cpus": 8.0, "gpus": 0.0}), nodes)
    with pytest.raises(ConfigError, match="gpus 1 each"):
        sweep_cluster.fitting(settings.model_copy(update={"gpus": 1.0}), [{"CPU": 2.0}])
