"""Exports and posteriors go to the hub and come from it; what it refuses is one line with code 2, and no token is ever shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import exported
import hub_server
import pytest
import tiny_run
import torch
from huggingface_hub import constants

from bpt_dist import train
from bpt_dist.artifacts import hub as own_hub
from bpt_dist.artifacts.inference.exports import Export, read_exports
from bpt_dist.commands.main import main
from bpt_dist.config import RunConfig
from bpt_dist.distributed.hub import reach_hub
from bpt_dist.errors import ConfigError, Stopped
from bpt_dist.library.prompts import load_prompt

PROGRAM = "import sys; from bpt_dist.commands.main import main; sys.exit(main())"
FOUR = ("task.json", "adapter_config.json", "adapter_model.safetensors", "README.md")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """BPT with its best particle on two targets."""
    plain = tiny_run.settings(world, {"name": "bpt", "sigma_relative": 1.0}, evaluation={"predict": "best"})
    return tiny_run.trained(tiny_run.load(world, plain))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub that this process may write to, an empty cache, and no waits between retries."""
    with hub_server.running() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, served.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # restored afterwards: a silent hub switches it on
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        forget()
        yield served
    forget()


def forget() -> None:
    """Let this process ask as a fresh one does."""
    reach_hub.cache_clear()
    own_hub._downloaded.cache_clear()


def predicted(world: Path, folder: Path, task: str, *words: str) -> list[dict[str, object]]:
    rows, out = folder / "rows.jsonl", folder / "answers.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in exported.rows(world, task)))
    assert main(["predict", *words, "--rows", str(rows), "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_one_export_is_the_repository_and_answers_from_there(
    hub: hub_server.Hub, world: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, name="one", data={"target_tasks": ["mood"]})
    one = tiny_run.trained(tiny_run.load(world, plain))
    assert main(["export", str(one), "--push-to", "lab/mood"]) == 0
    assert f"{hub.address}/lab/mood/commit/" in capsys.readouterr().out
    assert set(hub.files("lab/mood")) == {".gitattributes", *FOUR}
    adapter = one / "target" / "mood" / "adapter"
    assert all(hub.files("lab/mood")[name] == (adapter / name).read_bytes() for name in FOUR)
    exported.assert_equal(predicted(world, tmp_path, "mood", "lab/mood"), exported.predictions(one, "mood"))
    exported.assert_equal(predicted(world, tmp_path, "mood", "--prompt", "mood=lab/mood@main"), exported.predictions(one, "mood"))


def test_all_exports_of_a_run_are_folders_of_one_repository_written_in_one_commit(
    hub: hub_server.Hub, world: Path, run: Path, tmp_path: Path
) -> None:
    hub.commit("lab/all", {name: b"{}" for name in FOUR} | {"LICENSE": b"MIT", "README.md": b"mine"})
    assert main(["export", str(run), "--particles", "--posterior", "--push-to", "lab/all", "--private"]) == 0
    assert len(hub.commits) == 2
    files = hub.files("lab/all")
    assert {name.partition("/")[0] for name in files} == {
        "LICENSE", "README.md", "mood", "mood-best", "count", "count-best", "particles", "posterior"
    }  # fmt: skip
    assert files["README.md"] == b"mine"
    for kind in ("map", "best"):
        found = predicted(world, tmp_path, "count", "lab/all", *(["--best"] if kind == "best" else []))
        exported.assert_equal(found, exported.predictions(run, "count", kind))


def test_serve_takes_the_prompts_that_predict_takes(
    hub: hub_server.Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the hub and from a run; it ends here before the backbone is loaded."""
    taken: list[list[str]] = []

    def enough(_backbone: object, exports: list[Export], **_sizes: int) -> None:
        taken.append([f"{export.name} {export.folder.name}" for export in exports])
        raise ConfigError("enough")

    monkeypatch.setattr("bpt_dist.artifacts.inference.backbone.load_backbone", lambda export, _path: export)
    monkeypatch.setattr("bpt_dist.artifacts.inference.predictor.Predictor", enough)
    assert main(["export", str(run), "--push-to", "lab/all"]) == 0
    for words in (["lab/all"], ["lab/all", "--best"], [str(run)], [str(run), "--best"]):
        assert main(["serve", *words, "--port", "0"]) == 2
    assert capsys.readouterr().err.count("enough") == 4
    assert [sorted(names) for names in taken] == [
        ["count count", "mood mood"],
        ["count count-best", "mood mood-best"],
        ["count adapter", "mood adapter"],
        ["count best", "mood best"],
    ]


def test_the_library_reads_a_prompt_of_the_hub(hub: hub_server.Hub, run: Path) -> None:
    adapter = run / "target" / "mood" / "adapter"
    hub.commit("lab/mood", {name: (adapter / name).read_bytes() for name in FOUR})
    assert torch.equal(load_prompt("lab/mood").tensor, load_prompt(adapter).tensor)


def test_a_run_starts_from_a_posterior_of_the_hub_as_from_its_folder(hub: hub_server.Hub, world: Path, run: Path) -> None:
    assert main(["export", str(run), "--posterior", "--push-to", "lab/posterior@v1"]) == 0
    results = []
    for name, place in (("here", str(run)), ("there", "lab/posterior@v1")):
        plain = tiny_run.settings(world, {"name": "bpt", "sigma_relative": 1.0}, name=name, source={"posterior": place})
        started = tiny_run.trained(tiny_run.load(world, plain))
        results.append([entry["value"] for entry in json.loads((started / "results.json").read_text())])
        assert main(["export", str(started), "--particles"]) == 0  # which asks where the posterior is
    assert results[0] == results[1]


def started_from(world: Path, name: str, place: str) -> RunConfig:
    method = {"name": "prompt_tuning", "init": "file", "init_file": place}
    plain = tiny_run.settings(world, method, name=name)
    plain["data"].pop("source_tasks", None)
    return tiny_run.load(world, plain)


def test_a_prompt_of_the_hub_is_a_start_as_its_folder_is_and_is_pinned(hub: hub_server.Hub, world: Path, run: Path) -> None:
    adapter = run / "target" / "mood" / "adapter"
    hub.commit("lab/start", {name: (adapter / name).read_bytes() for name in FOUR})
    hub.commit("lab/folder", {f"mood/{name}": (adapter / name).read_bytes() for name in FOUR})
    found = []
    for name, place in (("file-here", str(adapter)), ("file-there", "lab/start"), ("file-below", "lab/folder")):
        ended = tiny_run.trained(started_from(world, name, place))
        values = [entry["value"] for entry in json.loads((ended / "results.json").read_text())]
        found.append((values, json.loads((ended / "inputs.json").read_text())["method.init_file"]))
    assert found[0] == found[1] == found[2]


def test_a_start_that_changed_on_the_hub_is_refused_on_resume(
    hub: hub_server.Hub, world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (run / "target" / task / "adapter" for task in ("mood", "count"))
    hub.commit("lab/start", {name: (one / name).read_bytes() for name in FOUR})
    config = started_from(world, "file-moves", "lab/start")
    with pytest.raises(Stopped), tiny_run.session(config) as opened:
        opened.watchdog.request_stop("test")
        train.train(opened)
    hub.commit("lab/start", {name: (other / name).read_bytes() for name in FOUR})
    forget()
    assert train.run_all(config) == 2
    assert "method.init_file: changed since " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (
            ("mood", "count"),
            "lab/odd has prompts for count, mood; download it by `hf download`, and give the folder of one of them",
        ),
        ((), "lab/odd holds no exported prompt; give the id of an exported prompt"),
    ],
    ids=["two", "none"],
)
def test_a_repository_that_is_no_one_prompt_is_no_start(
    files: tuple[str, ...], what: str, hub: hub_server.Hub, world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = {f"{task}/{name}": (run / "target" / task / "adapter" / name).read_bytes() for task in files for name in FOUR}
    hub.commit("lab/odd", below or {"README.md": b"nothing"})
    assert train.run_all(started_from(world, "file-odd", "lab/odd")) == 2
    assert train.run_all(started_from(world, "file-odd", "lab/missing")) == 2
    screen = capsys.readouterr().err
    assert f"method.init_file: {what}" in screen
    assert "method.init_file: lab/missing on " in screen
    assert "Traceback" not in screen


def test_a_branch_and_a_commit_are_other_prompts_than_the_main_branch(hub: hub_server.Hub, run: Path, tmp_path: Path) -> None:
    adapter = run / "target" / "mood" / "adapter"
    first = hub.commit("lab/moves", {name: (adapter / name).read_bytes() for name in FOUR})
    record = json.loads((adapter / "task.json").read_text())
    changed = json.dumps({**record, "written_by": "another"}).encode()
    hub.commit("lab/moves", {**hub.files("lab/moves"), "task.json": changed})
    assert read_exports(Path("lab/moves"))[0].record.written_by == "another"
    assert read_exports(Path(f"lab/moves@{first}"))[0].record.written_by == record["written_by"]


def test_only_data_is_downloaded(hub: hub_server.Hub, run: Path) -> None:
    adapter = run / "target" / "mood" / "adapter"
    hub.commit("lab/code", {name: (adapter / name).read_bytes() for name in FOUR} | {"evil.py": b"1", "adapter_model.bin": b"2"})
    (export,) = read_exports(Path("lab/code"))
    assert {path.name for path in export.folder.iterdir()} == set(FOUR)


def test_what_was_read_once_is_read_again_without_a_network(
    hub: hub_server.Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run / "target" / "mood" / "adapter"
    hub.commit("lab/kept", {name: (adapter / name).read_bytes() for name in FOUR})
    read_exports(Path("lab/kept"))
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    assert read_exports(Path("lab/kept"))[0].name == "mood"
    assert main(["predict", "lab/never", "--rows", "none"]) == 2
    assert "lab/never" in (screen := capsys.readouterr().err)
    assert "is not in the local cache, and the hub does not answer or is not to be asked; correct the id" in screen
    assert main(["export", str(run), "--push-to", "lab/kept"]) == 2
    assert "does not answer, or HF_HUB_OFFLINE is set; check the network and push again" in capsys.readouterr().err
    assert len(hub.asked) == asked


Prepare = Callable[[hub_server.Hub, pytest.MonkeyPatch], None]


def gated(hub: hub_server.Hub, patch: pytest.MonkeyPatch) -> None:
    hub.gated.add("lab/mood")
    patch.setenv("HF_TOKEN", "hf_Another0123")


def private(hub: hub_server.Hub, patch: pytest.MonkeyPatch) -> None:
    hub.private["lab/mood"] = True
    patch.setenv("HF_TOKEN", "hf_Another0123")


def fault(name: str) -> Prepare:
    return lambda hub, _patch: setattr(hub, "fault", name)


def stranger(_hub: hub_server.Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_Another0123")


@pytest.mark.parametrize(
    ("prompt", "prepare", "message"),
    [
        ("lab/none", fault(""), "there is no such repository, or it is private; correct the name, or log in"),
        ("lab/mood", private, "there is no such repository, or it is private; correct the name, or log in"),
        ("lab/mood", gated, "is gated; ask for access at"),
        ("lab/mood@v9", fault(""), "has no revision 'v9'; name a branch, a tag or a commit of it"),
        ("lab/mood", fault("503"), "could not be read: the hub answered 503; try again later"),
        ("lab/mood", fault("torn"), "could not be read: "),
    ],
    ids=["none", "private", "gated", "revision", "503", "torn"],
)
@pytest.mark.parametrize("reader", ["predict", "train"])
def test_what_cannot_be_read_is_one_line(
    reader: str, prompt: str, prepare: Prepare, message: str, hub: hub_server.Hub, world: Path, run: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    adapter = run / "target" / "mood" / "adapter"
    hub.commit("lab/mood", {name: (adapter / name).read_bytes() for name in FOUR})
    prepare(hub, monkeypatch)
    if reader == "predict":
        assert main(["predict", prompt, "--rows", "none"]) == 2
    else:
        plain = tiny_run.settings(world, {"name": "bpt", "sigma_relative": 1.0}, name="refused", source={"posterior": prompt})
        assert train.run_all(tiny_run.load(world, plain)) == 2
    screen = capsys.readouterr().err
    lines = [line for line in screen.splitlines() if message in line]
    assert lines
    assert prompt in lines[0]
    assert hub.address in lines[0]
    assert reader == "predict" or "source.posterior" in lines[0]
    assert "Traceback" not in screen + caplog.text
    assert "hf_" not in screen + caplog.text


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (stranger, "could not be written: the hub knows no token of yours; log in"),
        (fault("403"), "could not be written: the token may not do this; use one that may write for lab"),
        (fault("503"), "could not be written: the hub answered 503; try again later"),
        (fault("hangs-up"), "could not be written: the connection broke off"),
    ],
    ids=["401", "403", "503", "interrupted"],
)
def test_what_cannot_be_written_is_one_line_and_leaves_the_repository_as_it_was(
    prepare: Prepare, message: str, hub: hub_server.Hub, run: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hub.commit("lab/old", {"task.json": b"old"})
    prepare(hub, monkeypatch)
    assert main(["export", str(run), "--push-to", "lab/old"]) == 2
    screen = capsys.readouterr().err
    assert any(message in line and "lab/old" in line for line in screen.splitlines()), screen
    assert hub.files("lab/old") == {"task.json": b"old"}
    assert "Traceback" not in screen + caplog.text
    assert "hf_" not in screen + caplog.text
    hub.fault = None
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert main(["export", str(run), "--push-to", "lab/old"]) == 0
    assert "mood/task.json" in hub.files("lab/old")


def test_options_that_mean_nothing_are_refused(hub: hub_server.Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--push-to", "alone"], "--push-to alone: is not owner/name"),
        (["--push-to", "../up/name"], "is not owner/name"),
        (["--private"], "--private: has no effect without --push-to"),
    ):
        assert main(["export", str(run), *words]) == 2
        assert message in capsys.readouterr().err
    assert not hub.asked


@pytest.mark.parametrize("text", ["runs/NAME", "./a/b", "/a/b", "a/b/c", "a", "a/b@", "a/b@../c", "-a/b", "a/b c"])
def test_a_path_is_no_id(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "owner" / "there").mkdir(parents=True)
    assert own_hub.hub_place(text) is None
    assert own_hub.hub_place("owner/there") is None
    assert str(own_hub.hub_place("lab/name")) == "lab/name"
    assert str(own_hub.hub_place("runs/name@v1")) == "runs/name@v1"


def test_the_whole_way_by_the_commands_shows_no_token(world: Path, run: Path, tmp_path: Path) -> None:
    """Processes of their own with the library's own log at its loudest; the token is in the environment only."""
    rows = "".join(json.dumps(row) + "\n" for row in exported.rows(world, "mood"))
    with hub_server.running() as served:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_VERBOSITY": "debug",
        }  # fmt: skip
        said = []
        for words in (["export", str(run), "--task", "mood", "--push-to", "lab/way"], ["predict", "lab/way", "--best"]):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *words], input=rows, capture_output=True, text=True, env=environment, check=False
            )
            assert done.returncode == 0, done.stderr
            said.append(done)
    exported.assert_equal([json.loads(line) for line in said[1].stdout.splitlines()], exported.predictions(run, "mood", "best"))
    everything = "".join(done.stdout + done.stderr for done in said)
    assert hub_server.TOKEN not in everything
    assert re.search(r"/lab/way/commit/[0-9a-f]{40}", said[0].stdout)
