"""A Tune trial: in its own process on its share of the machine, or (`source` sweeps) the driver of a Ray Train job."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from bpt_dist.commands.sweep.trial import POLL, PRUNED, STOP, Scores, TrialThread, prepare_process, train_trial
from bpt_dist.config import RunConfig
from bpt_dist.distributed.environment import free_port
from bpt_dist.tracking.mirror import shutdown

if TYPE_CHECKING:
    from bpt_dist.training.run import TrainingRun


class InProcess(tune.Trainable):
    """Trains one run after another in this process; each result is a validation.

    The run directory is the checkpoint: a process that takes the place of a dead one opens it and resumes.
    """

    work: TrialThread | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the run."""
        prepared = prepare_process(Path(config["file"]), Path(config["cwd"]), config["cpus"])
        self.work = TrialThread(prepared, Path(config["sweep"]), config["tags"])

    def step(self) -> dict[str, Any]:
        """Wait for the next validation or the end.

        Raises RuntimeError where another attempt may help, so that Tune makes one.
        """
        from bpt_dist.commands.sweep.trial import NOT_RETRIED

        assert self.work is not None
        news = self.work.next()
        if news.done and news.code and news.code not in NOT_RETRIED:
            raise RuntimeError(news.reason)
        return news.result()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run: torch and transformers need not be imported again."""
        if self.work is not None:
            self.work.close("the process takes the next trial")
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """End the run, and the process that mirrors this process's runs."""
        if self.work is not None:
            self.work.close("the sweep ended")
        shutdown()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the run keeps its own checkpoints."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: the run resumes from its own checkpoints."""


class ManyProcesses(tune.Trainable):
    """Starts a Ray Train job for one run and follows the validations in its metrics; the ranks look for requests to stop."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the job."""
        self.task, self.shown, self.ending = config, 0, queue.Queue[BaseException | None]()
        self.run_config = prepare_process(Path(config["file"]), Path(config["cwd"]), 1)
        for name in (PRUNED,):
            (self.run_config.directory / name).unlink(missing_ok=True)
        self.scores = Scores(self.run_config)
        self.shown = len(self.scores.look())
        self.thread = threading.Thread(target=self._fit, name="train", daemon=True)
        self.thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for the next validation or the end of the job.

        Raises RuntimeError where another attempt may help, so that Tune makes one.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                return self._ended(self.ending.get(timeout=POLL))
            points = self.scores.look()
            self.shown = min(self.shown, len(points))  # a resume cuts what its checkpoint does not know
            if len(points) > self.shown:
                self.shown += 1
                point = points[self.shown - 1]
                return {"step": point.step, "score": point.score, "done": False, "state": "running", "reason": None}

    def cleanup(self) -> None:
        """End the job: its ranks look for this file."""
        if self.thread.is_alive() and not (self.run_config.directory / PRUNED).is_file():
            from bpt_dist.storage.files import write_json_atomic

            write_json_atomic(Path(self.task["sweep"]) / STOP, {"reason": "the sweep ended"})
        self.thread.join(60)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the run keeps its own checkpoints."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing: the run resumes from its own checkpoints."""

    def _ended(self, error: BaseException | None) -> dict[str, Any]:
        from bpt_dist.commands.sweep.record import state_of

        state, reason = state_of(self.run_config)
        if state not in ("finished", "pruned", "stopped") and not (reason or "").startswith("NonFinite"):
            raise RuntimeError(reason or str(error))
        points = self.scores.look()
        step, score = points[-1] if points else (0, float("-inf"))
        return {"step": step, "score": score, "done": True, "state": state, "reason": reason}

    def _fit(self) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        task = self.task
        processes = {"CPU": task["cpus"], **({"GPU": task["gpus"]} if task["gpus"] else {})}
        trainer = TorchTrainer(
            train_rank,
            train_loop_config=task,
            torch_config=TorchConfig(init_method="env", timeout_s=self.run_config.distribution.startup_timeout),
            scaling_config=ScalingConfig(num_workers=task["workers"], use_gpu=bool(task["gpus"]), resources_per_worker=processes),
            run_config=RunConfig(name=task["trial"], storage_path=str(Path(task["sweep"]) / "ray" / "train")),
        )
        try:
            trainer.fit()
            self.ending.put(None)
        except BaseException as error:
            self.ending.put(error)


def train_rank(task: dict[str, Any]) -> None:
    """Train as one rank of the job; Ray Train has set RANK, WORLD_SIZE and the address of rank 0 (every rank)."""
    from bpt_dist.tracking.mirror import shutdown

    config, sweep_folder = prepare_process(Path(task["file"]), Path(task["cwd"]), task["cpus"]), Path(task["sweep"])
    _leave_group_of_ray()

    def begin(run: TrainingRun) -> None:
        threading.Thread(target=_watch, args=(run, config, sweep_folder), daemon=True).start()

    try:
        train_trial(config, sweep_folder, task["tags"], begin)
    finally:
        shutdown()


def _leave_group_of_ray() -> None:
    """End the process group that Ray Train made and leave the address of another: the run makes its own (every rank).

    The port is found on the host of rank 0, where it will be opened.
    """
    import torch.distributed as dist

    port: list[int | None] = [None]
    if dist.get_rank() == 0:
        port = [free_port("")]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port[0])


def _watch(run: TrainingRun, config: RunConfig, sweep_folder: Path) -> None:
    """Request a stop of this rank when the sweep ends the trial; the ranks agree on the step."""
    while True:
        for file in (config.directory / PRUNED, sweep_folder / STOP):
            if file.is_file():
                run.watchdog.request_stop(file.stem)
                return
        time.sleep(POLL)
