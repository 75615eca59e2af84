"""A trial is the ordinary run: the same bits, ended or resumed through files, with a true status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import tiny_sweep
from records import repeatable
from safetensors.torch import load_file

from bpt_dist.commands.sweep.preflight import check_inputs
from bpt_dist.commands.sweep.record import Record, TrialStatus, standing
from bpt_dist.commands.sweep.report import how_ended
from bpt_dist.commands.sweep.settings import Sweep, load
from bpt_dist.commands.sweep.trial import PRUNED, STOP, TrialThread, TrialUpdate, read_history
from bpt_dist.commands.sweep.tune import OptunaSearcher, _last_reason
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.metrics_log import MetricsLog, read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sweep.world(tmp_path_factory.mktemp("sweep"))


def sweep_of(folder: Path, **keys: object) -> Sweep:
    return load(tiny_sweep.write(folder, tiny_sweep.plain(folder, **keys)))


def only(folder: Path, name: str, **keys: object) -> RunConfig:
    sweep = sweep_of(folder, name=name, **keys)
    return sweep.trials(sweep.known_settings() or [])[0].config


def work_on(config: RunConfig) -> TrialThread:
    config.directory.parent.mkdir(parents=True, exist_ok=True)
    return TrialThread(config, config.directory.parent, {"bpt.trial": "0"})


def to_the_end(work: TrialThread) -> list[TrialUpdate]:
    found = [work.next()]
    while not found[-1].done:
        found.append(work.next())
    return found


def prompt(config: RunConfig) -> dict:
    return load_file(config.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors")


def metrics(config: RunConfig) -> list[dict]:
    records = read_records(config.directory / "metrics.jsonl")[0]
    return repeatable(record for record in records if record["stage"] != "sweep")


def test_a_trial_trains_what_the_launcher_trains(folder: Path) -> None:
    config = only(folder, "whole")
    news = to_the_end(work_on(config))
    alone = config.model_copy(update={"run_dir": folder / "runs" / "alone", "name": "alone"})
    tiny_run.trained(alone)
    assert [one.step for one in news] == [2, 4, 6, 8, 10, 12, 12]
    assert (news[-1].state, news[-1].code) == ("finished", 0)
    tiny_run.assert_same(prompt(config), prompt(alone))
    assert metrics(config) == metrics(alone)
    assert [point.score for point in read_history(alone)] == [one.score for one in news[:-1]]


def test_a_pruned_trial_ends_at_its_rung_and_says_so(folder: Path) -> None:
    config = only(folder, "cut")
    work = work_on(config)
    assert (work.next().step, work.next().step) == (2, 4)
    write_json_atomic(config.directory / PRUNED, {"step": 4, "score": 25.0})
    ending = work.next()
    assert (ending.done, ending.state, ending.step) == (True, "pruned", 4)
    status = read_json(config.directory / "status.json")
    assert (status["state"], status["reason"]) == ("stopped", "pruned by asha at step 4 with a score of 25.00")
    assert read_json(config.directory / "tags.json") == {"bpt.trial": "0", "bpt.pruned": "asha@4"}
    assert [point.step for point in read_history(config)] == [2, 4]


def test_a_stopped_trial_goes_on_to_the_same_bits(folder: Path) -> None:
    config = only(folder, "stopped")
    work = work_on(config)
    work.next()
    work.next()
    write_json_atomic(config.directory.parent / STOP, {"reason": "enough"})
    assert work.next().state == "stopped"
    assert read_json(config.directory / "status.json")["state"] == "stopped"
    (config.directory.parent / STOP).unlink()
    again = to_the_end(work_on(config))
    assert again[-1].state == "finished"
    whole = only(folder, "stopped-never")
    to_the_end(work_on(whole))
    tiny_run.assert_same(prompt(config), prompt(whole))
    assert metrics(config) == [{**record} for record in metrics(whole)]


def test_a_score_behind_megabytes_of_losses_is_found(folder: Path) -> None:
    """In a sweep of the source stage validations come last."""
    config = only(folder, "long")
    config.directory.mkdir(parents=True)
    log = MetricsLog(config.directory / "metrics.jsonl")
    for step in range(8):
        log.append({"step": step, "stage": "source", "metrics": {"source/loss": 1.0}, "pad": [0.5] * 200_000})
    log.append({"step": 2, "stage": "target/joint", "metrics": {"target/validation/accuracy": 75.0}})
    log.close()
    assert len(read_records(config.directory / "metrics.jsonl")[0]) < 9
    assert [point.score for point in read_history(config)] == [75.0]


def test_a_trial_that_diverges_is_not_tried_again(folder: Path) -> None:
    sweep = sweep_of(folder, name="diverged", space={"method.lr_full": [1e30], "method.sigma_relative": [1.0]}, seeds=[0])
    record = Record.open(sweep, resume=False)
    ending = to_the_end(work_on(record.trials[0].config))[-1]
    assert (ending.state, ending.code) == ("failed", 77)
    assert standing(record.trials[0]).diverged
    assert record.waiting() == []
    assert record.best() is None


def test_an_existing_sweep_is_refused_or_resumed(folder: Path) -> None:
    refused = Record.open(sweep_of(folder, name="kept", seeds=[5]), resume=False)  # rejected before its first trial: does not block
    record = Record.open(sweep_of(folder, name="kept"), resume=False)
    assert record.id != refused.id
    record.trials[0].config.directory.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds this sweep, 0 of 4 trials have ended; add --resume to continue"):
        Record.open(sweep_of(folder, name="kept"), resume=False)
    other = {"method.sigma_relative": [0.1, 3.0], "method.lr_full": [0.1]}
    with pytest.raises(ConfigError, match=r"space.method.sigma_relative: \[0.1, 10.0\] -> \[0.1, 3.0\]"):
        Record.open(sweep_of(folder, name="kept", space=other), resume=True)
    again = Record.open(sweep_of(folder, name="kept"), resume=True)
    assert again.id == record.id
    assert [trial.name for trial in again.waiting()] == [trial.name for trial in record.trials]
    (folder / "runs" / "foreign").mkdir()
    (folder / "runs" / "foreign" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and no sweep"):
        Record.open(sweep_of(folder, name="foreign"), resume=True)


def test_a_posterior_that_is_not_there_or_of_another_t5_is_refused(folder: Path, tmp_path: Path) -> None:
    missing = only(folder, "missing", run={"source": {"posterior": str(folder / "runs" / "nothing")}})
    with pytest.raises(ConfigError, match=r"no posterior\.safetensors"):
        check_inputs([missing])
    longer = only(folder, "longer", run={"method": {"length": 4}})
    with pytest.raises(ConfigError, match=r"method.length: is 4, the prompts of source.posterior have 3 positions"):
        check_inputs([longer])
    worded = only(folder, "worded", run={"data": {"protocol": "attempt"}})
    with pytest.raises(ConfigError, match=r"data.protocol: is attempt, the source.posterior was learnt from texts of fixed"):
        check_inputs([worded])
    tiny_run.tiny_t5.make(tmp_path / "t5", seed=1)
    other = only(folder, "other", run={"backbone": {"path": str(tmp_path / "t5")}})
    with pytest.raises(ConfigError, match="was made with another backbone"):
        check_inputs([other])


def test_what_trials_of_several_processes_need_is_said_before_the_first(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = {"steps": 4, "batch_size": 2, "lr": 0.3, "posterior": None}
    keys = {"stage": "source", "space": {"method.kernel": ["imq"]}, "seeds": [0]}
    config = only(folder, "rows", run={"source": source, "method": {"sigma_relative": 1.0}, "target": {"batch_size": 1}}, **keys)
    check_inputs([config], workers=2)
    check_inputs([config], workers=3)
    assert "target.batch_size: a step has 2 text(s) for 3 ranks" in caplog.text
    file = folder / "tasks" / "colour" / "train.jsonl"
    before = file.read_text()
    try:
        file.write_text(before + '{"text": "the cat", "label": 7}\n')
        with pytest.raises(DataError, match=r"colour/train\.jsonl:33: .*label"):
            check_inputs([config], workers=2)
    finally:
        file.write_text(before)


def test_the_reason_of_a_trial_that_could_not_write_it_down_is_shown(folder: Path) -> None:
    errors = "Failure # 1 (occurred at x)\nRuntimeError: first\nFailure # 2 (occurred at x)\n  File ...\nRuntimeError: no space\n"
    assert _last_reason(errors) == "no space"
    refused = (
        "Failure # 1 (occurred at x)\nray.exceptions.ActorDiedError: The actor died because of an error raised in its creation "
        "task, ray::InProcess.__init__()\n  File ...\nbpt_dist.errors.ConfigError: 'a b.yaml': no such configuration file\n"
    )
    assert _last_reason(refused) == "'a b.yaml': no such configuration file"
    lost = "Failure # 1 (occurred at x)\nray.exceptions.ActorDiedError: The actor died unexpectedly\n\tclass_name: InProcess\n"
    assert _last_reason(lost) is None
    assert _last_reason(errors + "Failure # 3 (occurred at x)\nThe actor died unexpectedly\n") is None
    failed = TrialStatus(0, "trial-000-s0", 0, {}, "failed", "no space " * 30, 3, None, None)
    assert how_ended([failed, replace(failed, state="finished")]).startswith("1 failed (no space no space")
    assert len(how_ended([failed])) < 150


def test_optuna_scores_a_setting_by_the_mean_of_its_seeds(folder: Path) -> None:
    space = {"method.sigma_relative": {"log_uniform": [0.01, 100]}, "method.rank": [1, 2]}
    sweep = sweep_of(folder, name="tpe", search="optuna", num_settings=3, space=space)
    handed = []

    def task(trial: object) -> dict:
        handed.append(trial)
        return {"trial": trial}

    search = OptunaSearcher(sweep, [], {}, task, lambda: False)
    for place in range(6):
        assert search.suggest(str(place)) != "FINISHED"
        search.on_trial_complete(str(place), {"score": 10.0 * place})
    assert search.suggest("6") == "FINISHED"
    assert [(trial.number, trial.seed) for trial in handed] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [trial.value for trial in search._study.trials] == [5.0, 25.0, 45.0]
    first = handed[0].values
    restored = OptunaSearcher(replace(sweep), handed[1:2], {0: (first, None), 1: (handed[2].values, 25.0)}, task, lambda: False)
    assert restored.suggest("a")["trial"] is handed[1]  # the seed that was still missing
    assert restored.suggest("b")["trial"].number == 2
    assert [trial.value for trial in restored._study.trials] == [25.0, None]
