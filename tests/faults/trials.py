"""A run directory and the starts that disturb and finish it, on the tiny T5, through the fork server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_run
import yaml
from oracle import assert_same_run, assert_sound
from server import Ended, ForkServer, Start

from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import RunStatus, read_status

STAGES = ("source", "target/mood", "target/count")
EVALUATION = {"batch_size": 3}


class Job:
    """One run; each `start` is judged by what must hold after every start."""

    def __init__(
        self, server: ForkServer, world: Path, folder: Path, method: dict[str, Any] | None = None, **sections: Any
    ) -> None:
        self.server, self.world, self.folder = server, world, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.directory = folder / "run.yaml", folder / "runs" / "run"
        self.plain = tiny_run.settings(
            world, {"name": "bpt", **(method or {})}, **{"output": str(folder / "runs"), "evaluation": EVALUATION, **sections}
        )
        self.write()

    def write(self) -> None:
        """Write the settings as the program reads them."""
        self.config.write_text(yaml.safe_dump(self.plain))

    def start(self, fault: str = "", size: int = 1, **options: Any) -> Ended:
        """Start the same command once."""
        ended = self.server.start(Start(self.config, size, fault, **options))
        assert_sound(self.directory, ended)
        return ended

    def finish(self, size: int = 1, **options: Any) -> None:
        """Start once more, undisturbed: it must finish."""
        ended = self.start("", size, **options)
        assert ended.codes == [0] * size, ended.screen

    @property
    def status(self) -> RunStatus | None:
        """The status as it is true now."""
        return read_status(self.directory)

    @property
    def reason(self) -> str:
        """Why the last start ended, as status.json says."""
        return str(read_json(self.directory / "status.json")["reason"])


class Trials:
    """Makes jobs, and the undisturbed runs they are compared with (one for each layout)."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.world = tiny_run.world(folder / "world")
        self.count = 0
        self._references: dict[str, Job] = {}

    def job(self, method: dict[str, Any] | None = None, **sections: Any) -> Job:
        """Return a new run directory's job."""
        self.count += 1
        return Job(self.server, self.world, self.folder / f"job-{self.count}", method, **sections)

    def reference(self, size: int = 1, method: dict[str, Any] | None = None, **sections: Any) -> Path:
        """Return the directory of an undisturbed run on `size` ranks."""
        key = repr((size, method, sorted(sections.items())))
        if key not in self._references:
            job = self.job(method, **sections)
            job.finish(size)
            self._references[key] = job
        return self._references[key].directory

    def assert_as_undisturbed(self, job: Job, size: int = 1, method: dict[str, Any] | None = None, **sections: Any) -> None:
        """Assert that a run ended with the bits of an undisturbed one of the same layout."""
        assert_same_run(job.directory, self.reference(size, method, **sections))
