"""A Tune trial: in its own process on its share of the machine, or (`source` sweeps) the driver of a Ray Train job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from bpt_dist.mirror import shutdown
from bpt_dist.sweep_work import Work, prepare_process


class InProcess(tune.Trainable):
    """Trains one run after another in this process; each result is a validation.

    The run directory is the checkpoint: a process that takes the place of a dead one opens it and resumes.
    """

    work: Work | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the run."""
        prepared = prepare_process(Path(config["file"]), Path(config["cwd"]), config["cpus"])
        self.work = Work(prepared, Path(config["sweep"]), config["tags"])

    def step(self) -> dict[str, Any]:
        """Wait for the next validation or the end.

        Raises RuntimeError where another attempt may help, so that Tune makes one.
        """
        from bpt_dist.sweep_work import HOPELESS

        assert self.work is not None
        news = self.work.next()
        if news.done and news.code and news.code not in HOPELESS:
            raise RuntimeError(news.reason)
        return news.result()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run: torch and transformers need not be imported again."""
        if self.work is not None:
            self.work.close("the sweep went on")
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
