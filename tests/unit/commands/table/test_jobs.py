"""How the runs of a table are handed out and what the command ends with, in this process or in another."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.commands.table.command import _write_table, mixture_notes
from bpt_dist.commands.table.jobs import Jobs, Outcome
from bpt_dist.commands.table.trainers import InProcessTrainer, WorkerTrainer
from bpt_dist.config import RunConfig
from bpt_dist.distributed.environment import child_environment, num_gpus
from bpt_dist.errors import ConfigError
from bpt_dist.storage import lock as locks
from bpt_dist.storage.lock import Holder, RunLock, holder_of

PROMPT = {"method": {"name": "prompt_tuning"}, "target": {"lr": 0.3}}


class Silent:
    def started(self, jobs: Jobs, run: RunConfig, trainer: int) -> None: ...

    def ended(self, jobs: Jobs, run: RunConfig, outcome: Outcome, *, again: bool) -> None: ...

    def elsewhere(self, jobs: Jobs, run: RunConfig, holder: Holder | None) -> None: ...

    def retired(self, jobs: Jobs, trainer: int) -> None: ...


class Told(Silent):
    """Keeps what it was told of other commands and of trainers that were given up."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, object]] = []

    def elsewhere(self, jobs: Jobs, run: RunConfig, holder: Holder | None) -> None:
        self.lines.append((run.name, holder and holder.pid))

    def retired(self, jobs: Jobs, trainer: int) -> None:
        self.lines.append(("retired", trainer))


class Scripted:
    """Ends every run as the test says: a list of outcomes a name, the last for good; a run that ends with 0 is finished on disk."""

    def __init__(self, outcomes: dict[str, list[Outcome]] | None = None) -> None:
        self.outcomes, self.seen, self.stopped = outcomes or {}, [], False

    def train(self, run: RunConfig) -> Outcome:
        self.seen.append(run.name)
        left = self.outcomes.get(run.name, [Outcome(0, None, 1.0)])
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome.code == 0:
            finish(run)
        return outcome

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None: ...


def finish(run: RunConfig) -> None:
    """Leave what a finished run leaves."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "run.json").write_text(json.dumps({"fingerprint": configuration.fingerprint(run)}))
    (run.directory / "status.json").write_text(json.dumps({"state": "finished"}))


@pytest.fixture
def runs(tmp_path: Path) -> list[RunConfig]:
    tiny_run.write_tasks(tmp_path / "tasks")
    plain = tiny_run.settings(
        tmp_path, {"name": "bpt"}, output=str(tmp_path / "runs"), rows=[PROMPT, {"label": "bpt"}], seeds=[3, 1]
    )
    return configuration.expand(tiny_run.load(tmp_path, plain))


DIED = Outcome(70, "worker 0 was ended by SIGKILL", 1.0, died=True)


def test_a_seed_is_complete_before_the_next_begins(runs: list[RunConfig]) -> None:
    trainer = Scripted()
    assert Jobs(runs, Silent()).train([trainer]) == 0
    assert trainer.seen == ["prompt_tuning-s3", "bpt-s3", "prompt_tuning-s1", "bpt-s1"]


def test_what_died_is_tried_once_more_and_only_once(runs: list[RunConfig]) -> None:
    once, twice = Outcome(0, None, 1.0), DIED
    trainer = Scripted({"bpt-s3": [DIED, once], "bpt-s1": [twice]})
    assert Jobs(runs, Silent()).train([trainer]) == 70
    assert trainer.seen.count("bpt-s3") == trainer.seen.count("bpt-s1") == 2


def test_the_exit_code_is_that_of_the_first_failed_row(runs: list[RunConfig]) -> None:
    trainer = Scripted({"bpt-s3": [Outcome(65, "bad row", 1.0)], "prompt_tuning-s1": [Outcome(77, "NaN", 1.0)]})
    jobs = Jobs(runs, Silent())
    assert jobs.train([trainer]) == 77  # prompt tuning is the first row of the table
    assert len(trainer.seen) == 4
    assert jobs.outcomes["bpt-s3"].reason == "bad row"


def test_a_stop_takes_no_further_run(runs: list[RunConfig]) -> None:
    trainer = Scripted({"bpt-s3": [Outcome(75, "stopped", 1.0)]})
    assert Jobs(runs, Silent()).train([trainer]) == 75
    assert trainer.seen == ["prompt_tuning-s3", "bpt-s3"]


def test_several_trainers_share_the_runs(runs: list[RunConfig]) -> None:
    trainers = [Scripted() for _ in range(3)]
    assert Jobs(runs, Silent()).train(trainers) == 0
    assert sorted(name for each in trainers for name in each.seen) == sorted(run.name for run in runs)


def test_a_run_that_another_command_trains_is_waited_for_and_not_trained_again(runs: list[RunConfig]) -> None:
    lock = held(runs[0])
    trainer, told = Scripted(), Told()

    def end_elsewhere() -> None:
        finish(runs[0])
        lock.release()

    timer = threading.Timer(1.5, end_elsewhere)
    timer.start()
    assert Jobs(runs, told).train([trainer]) == 0
    timer.join()
    assert sorted(trainer.seen) == sorted(run.name for run in runs[1:])
    assert told.lines == [(runs[0].name, lock.me.pid), (runs[0].name, None)]


def test_a_command_that_was_faster_makes_no_failure(runs: list[RunConfig]) -> None:
    """Two commands that start at once take the same run; the lock decides when both have loaded their T5."""

    class Beaten(Scripted):
        def train(self, run: RunConfig) -> Outcome:
            if run is runs[0] and run.name not in self.seen:
                lock = held(run)
                threading.Timer(0.7, lock.release).start()
                self.seen.append(run.name)
                return Outcome(ConfigError.exit_code, "a run is alive here", 1.0)
            return super().train(run)

    trainer = Beaten()
    assert Jobs(runs, Silent()).train([trainer]) == 0
    assert trainer.seen.count(runs[0].name) == 2


def held(run: RunConfig) -> RunLock:
    """Hold the lock of a run, as the process that trains it does."""
    run.directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run.directory)
    lock.acquire()
    return lock


def test_a_lock_given_back_while_it_is_looked_at_has_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(tmp_path)
    elsewhere = replace(lock.me, machine="another machine")
    path = tmp_path / locks.NAME
    path.write_text(json.dumps(asdict(elsewhere)))
    assert holder_of(tmp_path) == elsewhere
    read = locks._read

    def read_and_release(place: Path) -> Holder | None:
        found = read(place)
        place.unlink()
        return found

    monkeypatch.setattr(locks, "_read", read_and_release)
    assert holder_of(tmp_path) is None


def test_a_trainer_that_never_reaches_a_step_is_retired_and_others_take_its_run(runs: list[RunConfig]) -> None:
    """As a worker with a broken device: it would otherwise fail one run after another while the others still train."""

    class Broken(Scripted):
        def train(self, run: RunConfig) -> Outcome:
            self.seen.append(run.name)
            return Outcome(70, "RuntimeError: CUDA error", 0.0)

    failed = threading.Event()

    class Patient(Scripted):
        def train(self, run: RunConfig) -> Outcome:
            failed.wait(timeout=60)
            return super().train(run)

    class Watching(Told):
        def retired(self, jobs: Jobs, trainer: int) -> None:
            super().retired(jobs, trainer)
            failed.set()

    broken, sound, told = Broken(), Patient(), Watching()
    assert Jobs(runs, told).train([broken, sound]) == 0
    assert len(broken.seen) == 1
    assert sorted(sound.seen) == sorted(run.name for run in runs)
    assert told.lines == [("retired", 0)]


def test_a_row_that_fails_everywhere_retires_no_trainer_that_has_trained(runs: list[RunConfig]) -> None:
    broken = Outcome(70, "ValueError: a bug of the method", 0.0)
    trainer, told = Scripted({"bpt-s3": [broken], "bpt-s1": [broken]}), Told()
    jobs = Jobs(runs, told)
    assert jobs.train([trainer]) == 70  # the only one is kept whatever happens
    assert len(trainer.seen) == 4
    jobs = Jobs(runs, told)
    assert jobs.train([Scripted({"bpt-s3": [broken], "bpt-s1": [broken]}) for _ in range(2)]) == 70
    assert set(jobs.outcomes) == {"bpt-s3", "bpt-s1"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_of_which_nobody_says_how_it_ended_is_an_error(runs: list[RunConfig]) -> None:
    """A trainer's thread may die of what is not its run's fault; the others go on, and the command must not end with 0."""

    class NoScreen(Silent):
        def started(self, jobs: Jobs, run: RunConfig, trainer: int) -> None:
            if run.name == "bpt-s3":
                raise OSError("the terminal is gone")

    jobs = Jobs(runs, NoScreen())
    trainers = [Scripted(), Scripted()]
    assert jobs.train(trainers) == 70
    assert sorted(name for each in trainers for name in each.seen) == sorted(run.name for run in runs if run.name != "bpt-s3")
    jobs.stopping = True
    assert jobs.exit_code() == 75


def test_the_time_left_is_what_equal_rows_took(runs: list[RunConfig]) -> None:
    jobs = Jobs(runs, Silent())
    assert jobs.seconds_left() is None
    jobs._at_work, jobs.waiting = {0, 1}, [run for run in runs if run.seed == 1]
    jobs.outcomes = {"prompt_tuning-s3": Outcome(0, None, 10.0), "bpt-s3": Outcome(0, None, 30.0)}
    assert jobs.seconds_left() == (10 + 30) / 2


def test_the_time_left_of_other_rows_goes_by_the_texts_they_read(runs: list[RunConfig]) -> None:
    """A table begins with its short rows, whose mean says nothing about the others."""

    def of(label: str, steps: int, particles: int, predict: str = "map", posterior: Path | None = None) -> RunConfig:
        run = next(run for run in runs if run.name == "bpt-s3")
        sections = {
            "source": run.source.model_copy(update={"steps": steps, "posterior": posterior}),
            "target": run.target.model_copy(update={"steps": steps}),
            "method": run.method.model_copy(update={"num_particles": particles}),
            "data": run.data.model_copy(update={"max_eval_rows": 100}),
            "evaluation": run.evaluation.model_copy(update={"predict": predict}),
        }
        return run.model_copy(update={"name": f"{label}-s3", **sections})

    short, long, elsewhere = of("short", 0, 1), of("long", 100, 4), Path("elsewhere")
    reused, averaged = of("reused", 100, 4, posterior=elsewhere), of("averaged", 100, 4, "ensemble", elsewhere)
    jobs = Jobs([short, long, reused, averaged], Silent())
    jobs._at_work, jobs.waiting = {0}, [long]
    jobs.outcomes = {"short-s3": Outcome(0, None, 10.0)}
    targets, given = len(short.data.target_tasks), short.source
    num_source = 4 * 3 * 100 * given.batch_size * len(short.data.source_tasks)
    num_target = targets * 3 * 100 * short.target.batch_size
    assert jobs.seconds_left() == pytest.approx(10 * (num_source + num_target + targets * 100) / (targets * 100))
    jobs.waiting = [reused]
    assert jobs.seconds_left() == pytest.approx(10 * (num_target + targets * 100) / (targets * 100))
    jobs.waiting = [averaged]  # the MAP prompt and four particles are adapted, four predict
    assert jobs.seconds_left() == pytest.approx(10 * (5 * num_target + 4 * targets * 100) / (targets * 100))


def test_the_time_left_after_runs_that_read_nothing_is_a_number(runs: list[RunConfig]) -> None:
    empty = runs[0].model_copy(update={"data": runs[0].data.model_copy(update={"target_tasks": ()})})
    jobs = Jobs([empty, runs[1]], Silent())
    jobs._at_work, jobs.waiting, jobs.outcomes = {0}, [runs[1]], {empty.name: Outcome(0, None, 1.0)}
    assert jobs.seconds_left()


def test_processes_side_by_side_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpt_dist.distributed.environment.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [child_environment(n)["OMP_NUM_THREADS"] for n in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert child_environment(3)["OMP_NUM_THREADS"] == "5"


def test_what_a_launcher_said_to_this_process_is_not_said_to_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two workers that inherit one MASTER_PORT join one job, or wait for ranks that never come."""
    inherited = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    worker = WorkerTrainer(0, 2, tmp_path)
    assert {name: worker.environment[name] for name in inherited if name in worker.environment} == {"LOCAL_RANK": "0"}
    monkeypatch.setattr(
        "bpt_dist.commands.table.worker.train_here", lambda run: (sum(name in os.environ for name in inherited), None)
    )
    assert InProcessTrainer().train(RunConfig.model_construct()).code == 0


@pytest.mark.parametrize(
    ("visible", "number"),
    [(None, 3), ("", 0), ("1", 1), ("0, 2", 2), ("-1", 0), ("0,-1,2", 1), ("GPU-8932f937,GPU-2", 2), ("NoDevFiles", 0)],
)
def test_the_gpus_are_those_this_process_may_use(
    visible: str | None, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("bpt_dist.distributed.environment.DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == number


def test_runs_that_found_another_backbone_or_other_rows_are_named(runs: list[RunConfig]) -> None:
    """A configuration names files only: what they held is recorded by each run."""
    for run in runs:
        finish(run)
        record(run, "aa", {"target/mood/test": "11", "target/mood/train": "12"})
    assert mixture_notes(runs) == []
    record(runs[2], "bb", {"target/mood/test": "21", "target/mood/train": "12"})
    (note,) = mixture_notes(runs)
    assert f"{runs[2].name} had another content of backbone, target/mood/test than the other runs" in note
    few_shot = [run.model_copy(update={"data": run.data.model_copy(update={"shots": 2})}) for run in runs]
    for run in few_shot:
        record(run, "aa", {"target/mood/train": str(run.seed)})
    assert mixture_notes(few_shot) == []


def record(run: RunConfig, backbone: str, data: dict[str, str]) -> None:
    (run.directory / "backbone.json").write_text(json.dumps({"backbone_hash": backbone, "tokenizer_hash": "cc"}))
    (run.directory / "data.json").write_text(json.dumps(data))


def test_a_run_waits_for_the_one_whose_posterior_it_starts_from(tmp_path: Path) -> None:
    """`{seed}` is the run's own; what waits is passed over for what does not, and a failed maker holds nobody."""
    tiny_run.write_tasks(tmp_path / "tasks")
    late = {"label": "late", "source": {"posterior": str(tmp_path / "runs" / "run" / "bpt-s{seed}")}}
    plain = tiny_run.settings(
        tmp_path, {"name": "bpt"}, output=str(tmp_path / "runs"), rows=[late, PROMPT, {"label": "bpt"}], seeds=[0, 1]
    )
    found = configuration.expand(tiny_run.load(tmp_path, plain))
    assert {str(run.source.posterior) for run in found[:2]} == {str(tmp_path / "runs" / "run" / f"bpt-s{seed}") for seed in (0, 1)}
    trainer = Scripted({"bpt-s1": [Outcome(77, "loss is nan", 1.0)]})
    assert Jobs(found, Silent()).train([trainer]) == 77
    assert trainer.seen.index("bpt-s0") < trainer.seen.index("late-s0")
    assert trainer.seen.index("bpt-s1") < trainer.seen.index("late-s1")
    assert len(trainer.seen) == 6


# --- the table of finished runs ---------------------------------------------------------------------------------------


def test_a_complete_table_is_never_replaced_by_one_with_missing_runs(runs: list[RunConfig]) -> None:
    folder = runs[0].directory.parent
    for number, run in enumerate(runs):
        finish(run)
        entry = {
            "method": run.method.name, "backbone": "t5", "task": "mood", "split": "test", "n": 6, "metric": "accuracy",
            "value": 50.0 + number, "seed": run.seed, "steps": 3, "trainable_parameters": 9, "joint": False,
            "stage": "target/mood", "run": run.name, "predict": "map", "decode": "rank", "protocol": "fixed", "headline": True,
        }  # fmt: skip
        (run.directory / "results.json").write_text(json.dumps([entry]))
        if number == 0:  # the first table may have missing runs
            _write_table(runs, Jobs(runs, Silent()), folder, "test", ["bpt:prompt_tuning"])
            assert "Not tested: bpt against PT, no results of bpt." in (folder / "table.md").read_text()
            assert len(json.loads((folder / "table.json").read_text())["missing"]) == 3
            assert not list(folder.glob("table_so_far.*"))
    _write_table(runs, Jobs(runs, Silent()), folder, "test", ["bpt:prompt_tuning"])
    shown = json.loads((folder / "table.json").read_text())
    # Seeds 3 and 1: 52 - 50 and 53 - 51.
    assert shown["sentences"][0] == "Not tested: BPT against PT, +2.0 points (the same at each of 2 seeds: no spread, no interval)."
    assert shown["sentences"][0] in (folder / "table.md").read_text()
    complete = {path.name: path.read_bytes() for path in folder.glob("table.*")}
    assert json.loads(complete["table.json"])["missing"] == []
    (runs[1].directory / "status.json").write_text(json.dumps({"state": "stopped", "reason": "received SIGINT"}))
    _write_table(runs, Jobs(runs, Silent()), folder, "test")
    assert {path.name: path.read_bytes() for path in folder.glob("table.*")} == complete
    assert len(json.loads((folder / "table_so_far.json").read_text())["missing"]) == 1
    finish(runs[1])
    _write_table(runs, Jobs(runs, Silent()), folder, "test")
    assert not list(folder.glob("table_so_far.*"))
