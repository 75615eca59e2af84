"""Every file a run writes is below `output`: one answer for the store and its artifacts, whatever names and moves there are."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import tiny_run

from bpt_dist.commands.check.job import _tracking
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.tracking import places
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.sender import Sender, sync
from bpt_dist.tracking.store import connect

NAMES = ["../x", "/Users/ann/prompts", "a/b", "..", ".", "a b", "Ä", "%2e%2e%2f", "x" * 128, ".hidden", "a\\b", "~root", "-rf"]


def config_in(folder: Path, **keys: object) -> RunConfig:
    tracked = {"mlflow": True, **keys.pop("tracking", {})}  # type: ignore[dict-item]
    tiny_run.write_tasks(folder / "tasks")
    return tiny_run.load(folder, tiny_run.settings(folder, {"name": "prompt_tuning"}, tracking=tracked, **keys))


def named_by_check(config: RunConfig) -> str:
    (finding,) = _tracking(config)
    return finding.text.partition(" ")[0]


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_dir", [None, "elsewhere/a/b/run1", "runs/group/run1", "runs/run1"])
def test_the_default_store_is_in_output_wherever_the_run_is(tmp_path: Path, run_dir: str | None) -> None:
    config = config_in(tmp_path, run_dir=run_dir and str(tmp_path / run_dir))
    assert places.store_uri(config) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert named_by_check(config) == f"{tmp_path}/runs/mlflow.db"


def test_a_run_in_the_store_of_an_earlier_version_continues_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path, run_dir=str(tmp_path / "a" / "b" / "run1"))
    earlier = tmp_path / "a" / "mlflow.db"
    config.directory.mkdir(parents=True)
    sqlite3.connect(earlier).close()
    earlier.touch()
    assert places.store_uri(config).endswith("/runs/mlflow.db"), "a store that happens to be there is not this run's"
    write_json_atomic(config.directory / "tracking.json", {"uri": f"sqlite:///{earlier}"})
    with caplog.at_level("INFO", "bpt_dist"):
        assert places.store_uri(config) == f"sqlite:///{earlier}"
    assert "continues there" in caplog.text
    given = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "https://tracking.example"})})
    assert places.store_uri(given) == "https://tracking.example"


def test_check_reads_a_store_whose_path_has_characters_of_addresses(tmp_path: Path) -> None:
    config = config_in(tmp_path, output=str(tmp_path / "a#b %41"))
    store = places.default_store(config.output)
    store.parent.mkdir()
    with closing(sqlite3.connect(store)) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT)")
    (finding,) = _tracking(config)
    assert (finding.remedy, finding.text) == (None, f"{store} can be read, experiment {config.name!r}")


def test_a_folder_that_no_address_of_sqlite_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output: .*a\?b contains '\?', which no address of the tracking store"):
        places.store_uri(config_in(tmp_path, output=str(tmp_path / "a?b")))


# --- artifacts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "plain-Name_1.2", "v..2"])
def test_an_experiment_name_never_becomes_a_path(name: str) -> None:
    folder = places.experiment_folder(name)
    assert places.PLAIN_FOLDER.fullmatch(folder)
    assert Path("/root", folder).resolve().parent == Path("/root")
    assert Path(places.artifact_location("sqlite:////out/mlflow.db", name) or "").name == folder


def test_different_names_have_different_folders() -> None:
    folders = [places.experiment_folder(name) for name in [*NAMES, "a_b", "x", "x" * 127]]
    assert len(set(folders)) == len(folders)
    assert places.artifact_location("https://tracking.example", "../x") is None


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: its tables take seconds to make."""
    folder = tmp_path_factory.mktemp("empty")
    connect(f"sqlite:///{folder}/mlflow.db")
    return folder


def run_in(output: Path, experiment: str, name: str = "run") -> tuple[Path, Request]:
    """Make a run that has sent nothing yet."""
    folder = output / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: run\n")
    write_json_atomic(folder / "status.json", {"state": "stopped", "reason": "asked", "updated": "x"})
    request = Request(id=name, uri=f"sqlite:///{output}/mlflow.db", experiment=experiment, run_name=name)
    write_json_atomic(folder / "tracking.json", {**vars(request), "folder": str(folder)})
    return folder, request


def forget_places() -> None:
    """Forget what MLflow remembers of a process's runs: a moved run is continued by another process."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()


def send(folder: Path, request: Request) -> None:
    forget_places()
    sender = Sender(folder, request)
    sender.finish()
    sender.close()


def files_of(store: Path, number: int = 1) -> dict[str, str]:
    """Return where MLflow looks for each artifact of all runs of an experiment."""
    client = connect(f"sqlite:///{store}")
    forget_places()
    paths = {}
    for run in client.search_runs([str(number)]):
        assert run.info.artifact_uri.startswith((store.parent / "mlartifacts").as_uri())
        for artifact in client.list_artifacts(run.info.run_id):
            paths[f"{run.data.tags['bpt.run_id']}/{artifact.path}"] = run.info.artifact_uri
    return paths


@pytest.mark.parametrize("name", ["{out}/Users/ann/soft", "../x"])
def test_artifacts_are_below_output_whatever_the_experiment_is_called(tmp_path: Path, empty: Path, name: str) -> None:
    name = name.format(out=tmp_path)
    output = tmp_path / "runs"
    shutil.copytree(empty, output)
    folder, request = run_in(output, name)
    send(folder, request)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert connect(request.uri).get_experiment("1").name == name, "the name that is shown stays"
    assert files_of(output / "mlflow.db").keys() == {"run/config.yaml"}


def test_new_runs_of_an_experiment_that_led_outside_are_kept_below_output(tmp_path: Path, empty: Path) -> None:
    output = tmp_path / "runs"
    shutil.copytree(empty, output)
    connect(f"sqlite:///{output}/mlflow.db").create_experiment("../x", artifact_location=f"file://{output}/mlartifacts/../x")
    folder, request = run_in(output, "../x")
    send(folder, request)
    assert files_of(output / "mlflow.db").keys() == {"run/config.yaml"}
    assert not (output / "x").exists()


@pytest.mark.parametrize("experiment", ["words", "a/b"])
def test_a_moved_run_writes_where_it_is_now(tmp_path: Path, empty: Path, experiment: str) -> None:
    before, after = tmp_path / "A", tmp_path / "B"
    shutil.copytree(empty, before)
    if experiment == "a/b":  # an earlier version made folders of it
        location = f"file://{before}/mlartifacts/a/b"
        connect(f"sqlite:///{before}/mlflow.db").create_experiment("a/b", artifact_location=location)
    folder, request = run_in(before, experiment)
    send(folder, request)
    before.rename(after)
    folder = after / "run"
    (folder / "results.json").write_text("[]")
    send(folder, Request(**{**vars(request), "uri": f"sqlite:///{after}/mlflow.db"}))
    assert not before.exists()
    assert files_of(after / "mlflow.db").keys() == {"run/config.yaml", "run/results.json"}
    assert len(list(after.glob("mlartifacts/**/config.yaml"))) == 1


def test_sync_of_a_moved_run_finds_its_store(tmp_path: Path, empty: Path) -> None:
    before, after = tmp_path / "A", tmp_path / "B"
    shutil.copytree(empty, before)
    folder, request = run_in(before / "sweep", "words")
    request = Request(**{**vars(request), "uri": f"sqlite:///{before}/mlflow.db"})
    send(folder, request)
    before.rename(after)
    (after / "sweep" / "run" / "results.json").write_text("[]")
    forget_places()
    assert sync(after / "sweep" / "run").uri == f"sqlite:///{after}/mlflow.db"
    assert not before.exists()
    assert files_of(after / "mlflow.db").keys() == {"run/config.yaml", "run/results.json"}


def test_sync_makes_no_store_at_a_place_that_is_gone(tmp_path: Path) -> None:
    folder, _ = run_in(tmp_path / "A", "words")
    shutil.move(tmp_path / "A", tmp_path / "B")
    with pytest.raises(StorageError, match=r"A/mlflow.db: this store is gone .* move it beside the runs"):
        sync(tmp_path / "B" / folder.name)
    assert not (tmp_path / "A").exists()


def test_a_copy_writes_into_its_own_store(tmp_path: Path, empty: Path) -> None:
    original, copy = tmp_path / "A", tmp_path / "B"
    shutil.copytree(empty, original)
    folder, request = run_in(original, "words")
    send(folder, request)
    shutil.copytree(original, copy)
    (copy / "run" / "results.json").write_text("[]")
    forget_places()
    assert sync(copy / "run").uri == f"sqlite:///{copy}/mlflow.db"
    assert files_of(copy / "mlflow.db").keys() == {"run/config.yaml", "run/results.json"}
    assert files_of(original / "mlflow.db").keys() == {"run/config.yaml"}


def test_artifacts_that_stayed_in_the_old_place_are_still_found(
    tmp_path: Path, empty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, alone = tmp_path / "A", tmp_path / "B"
    shutil.copytree(empty, original)
    folder, request = run_in(original, "words")
    send(folder, request)
    alone.mkdir()
    shutil.copy(original / "mlflow.db", alone)
    (run,) = connect(f"sqlite:///{alone}/mlflow.db").search_runs(["1"])
    assert run.info.artifact_uri.startswith((original / "mlartifacts").as_uri())
    assert f"its artifacts are still in {original / 'mlartifacts'}" in caplog.text


def test_locations_that_somebody_else_chose_stay(tmp_path: Path, empty: Path) -> None:
    output = tmp_path / "runs"
    shutil.copytree(empty, output)
    chosen = {
        "bucket": "s3://bucket/mlartifacts/bucket",
        "disk": f"file://{tmp_path}/disk",
        "server": f"file://{tmp_path}/mlartifacts/3",
    }
    client = connect(f"sqlite:///{output}/mlflow.db")
    for name, location in chosen.items():
        client.create_experiment(name, artifact_location=location)
    again = connect(f"sqlite:///{output}/mlflow.db")
    assert {name: again.get_experiment_by_name(name).artifact_location for name in chosen} == chosen
