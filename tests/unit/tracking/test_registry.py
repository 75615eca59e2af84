"""Finished prompts of a run become versions of registered models, once, and only where that was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_run
import yaml

from bpt_dist import config as configuration
from bpt_dist.config.mlflow_environment import URI as TRACKING_URI
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.tracking.mirror import shutdown
from bpt_dist.tracking.registry import _global_store
from bpt_dist.tracking.sender import sync
from bpt_dist.tracking.store import connect

METHOD = {"name": "prompt_tuning"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("models"))


def settings(folder: Path, name: str, method: dict | None = None, **tracking: object) -> dict:
    tracked = {"mlflow": True, "uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": "words"} | tracking
    return tiny_run.settings(folder, method or METHOD, name=name, tracking=tracked)


def trained(folder: Path, plain: dict) -> Path:
    run = tiny_run.trained(tiny_run.load(folder, plain))
    assert shutdown() == []
    return run


def test_a_finished_run_registers_its_prompts_once(folder: Path) -> None:
    run = trained(folder, settings(folder, "first", register_as="champion"))
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    own = read_json(run / "tracking.json")["run_id"]
    for task in ("mood", "count"):
        version = client.get_model_version_by_alias(f"words-{task}", "champion")
        assert version.run_id == own
        assert client.get_registered_model(f"words-{task}").tags["bpt.kind"] == "soft-prompt"
        import mlflow

        with _global_store(f"sqlite:///{folder / 'mlflow.db'}"):
            fetched = Path(mlflow.artifacts.download_artifacts(f"models:/words-{task}@champion"))
        stored = run / "target" / task / "adapter" / "adapter_model.safetensors"
        assert (fetched / "adapter_model.safetensors").read_bytes() == stored.read_bytes()
    sync(run)
    assert len(client.search_model_versions("name = 'words-mood'")) == 1
    second = trained(folder, settings(folder, "second", method={"name": "lora", "rank": 2}, register_as="champion"))
    version = client.get_model_version_by_alias("words-mood", "champion")
    assert version.run_id == read_json(second / "tracking.json")["run_id"]
    assert len(client.search_model_versions("name = 'words-mood'")) == 2


def test_without_the_option_nothing_is_registered_and_sync_does_it_after_an_outage(folder: Path) -> None:
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    trained(folder, settings(folder, "plain", experiment="quiet"))
    assert not client.search_registered_models("name = 'quiet-mood'")
    run = tiny_run.trained(
        tiny_run.load(folder, settings(folder, "late", experiment="late", uri="http://127.0.0.1:9", register_as="champion"))
    )
    assert shutdown() == [str(run)]
    state = read_json(run / "tracking.json")
    with pytest.raises(StorageError, match=r"nobody answers at http://127\.0\.0\.1:9 .*start the server, then run"):
        sync(run)
    write_json_atomic(run / "tracking.json", state | {"uri": f"sqlite:///{folder / 'mlflow.db'}"})  # the server is back, elsewhere
    sync(run)
    assert client.get_model_version_by_alias("late-mood", "champion").run_id == read_json(run / "tracking.json")["run_id"]


def test_a_method_that_leaves_no_peft_folder_is_refused_before_the_first_step(folder: Path) -> None:
    config = tiny_run.load(folder, settings(folder, "bias", method={"name": "bitfit"}, register_as="champion"))
    with pytest.raises(ConfigError, match=r"tracking.register_as: method bitfit leaves no PEFT folder"):
        tiny_run.trained(config)
    assert not (config.directory / "metrics.jsonl").read_text()


BAD = {
    "reserved": ({"register_as": "latest"}, "register_as: is no alias that MLflow takes (got 'latest'); use e.g. champion"),
    "a version": ({"register_as": "v3"}, "register_as: is no alias that MLflow takes"),
    "a dot": ({"register_as": "my.prompt"}, "register_as: is no alias that MLflow takes"),
    "characters": ({"register_as": "my prompt"}, "register_as: may hold a-z 0-9"),
    "not mirrored": ({"mlflow": False, "uri": None, "experiment": None, "register_as": "a"}, "register_as: has no effect"),
}


@pytest.mark.parametrize(("tracking", "text"), BAD.values(), ids=BAD)
def test_aliases_that_cannot_be_are_refused(folder: Path, tracking: dict, text: str) -> None:
    file = folder / "bad.yaml"
    file.write_text(yaml.safe_dump(settings(folder, "bad", **tracking)))
    with pytest.raises(ConfigError) as caught:
        configuration.load(file)
    assert text in str(caught.value)


@pytest.mark.parametrize("of_user", [None, "http://127.0.0.1:5000"])
def test_registering_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_user: str | None) -> None:
    """MLflow writes the address of its global client there, and the next run would take it for the user's."""
    import mlflow

    if of_user is not None:
        monkeypatch.setenv(TRACKING_URI, of_user)
    with pytest.raises(RuntimeError), _global_store(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        assert mlflow.get_tracking_uri() == os.environ[TRACKING_URI] == f"sqlite:///{tmp_path / 'mlflow.db'}"
        raise RuntimeError
    assert os.environ.get(TRACKING_URI) == of_user
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
