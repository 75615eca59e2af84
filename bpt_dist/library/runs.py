"""Finished runs: results, table, posterior, pictures and predictors, each read from the run directory when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from bpt_dist.artifacts.results import Result, collect
from bpt_dist.artifacts.stored_run import StoredRun
from bpt_dist.config.loading import row_label
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.library.page import Picture, facts_html, picture_html, rows_html
from bpt_dist.storage import layout

if TYPE_CHECKING:
    from bpt_dist.artifacts.inference.predictor import Predictor
    from bpt_dist.commands.table.table import Table
    from bpt_dist.config import RunConfig
    from bpt_dist.library.prompts import Posterior, Prompt

SHOWN = ("task", "split", "predict", "metric", "value", "n")  # of a result, in a notebook
FIRST_PICTURES = ("panel", "loss_per_task")  # the one that a notebook shows of a run
PAIR = 2


class Results(list[Result]):
    """Entries of `results.json` in their order; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        entries = [vars(result) | {"value": f"{result.value:.2f}"} for result in self]
        return rows_html(SHOWN, [[str(entry[name]) for name in SHOWN] for entry in entries])


class Run:
    """A finished run directory. `bpt_dist.Run.open(folder)` reads one that any command has trained."""

    def __init__(self, stored: StoredRun) -> None:
        self._stored = stored

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read the run in `folder`. Raises ConfigError unless it is a finished one."""
        return cls(StoredRun.open(Path(folder)))

    def __repr__(self) -> str:
        scores = ", ".join(
            f"{one.task} {one.metric} {one.value:.1f}" for one in self.results if one.headline and one.predict == "map"
        )
        return f"<Run {self.name!r} in {self.folder}: {scores}>"

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.config.name

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self._stored.folder

    @property
    def config(self) -> RunConfig:
        """The configuration with every default."""
        return self._stored.config

    @property
    def results(self) -> Results:
        """Every score that was measured, in percent (NLL in nats)."""
        return Results(collect([self.folder]).results)

    def table(self, *, split: str = "test", metrics: Sequence[str] = ()) -> Table:
        """Return the results table of this run alone. Raises DataError for a split or metric that was not measured."""
        from bpt_dist.commands.table.table import Table

        return Table.build(self.results, split=split, metrics=metrics)

    @property
    def posterior(self) -> Posterior:
        """What the targets started from. Raises ConfigError for a method without source stage."""
        from bpt_dist.library.prompts import load_posterior

        place = self._stored.posterior
        if place is None:
            raise ConfigError(f"{self.folder}: has no posterior; method {self.config.method.name} has no source stage")
        return load_posterior(place)

    def prompt(self, task: str | None = None) -> Prompt:
        """Return the adapted prompt of a target task, which may be left out where there is one. Raises ConfigError without one."""
        from bpt_dist.library.prompts import load_prompt

        return load_prompt(self.folder, task)

    def predictor(self, task: str | None = None, *, ensemble: bool = False, backbone: str | None = None) -> Predictor:
        """Return what answers rows of a target task, or of all of them, with the frozen model loaded.

            run.predictor("mood").predict([{"sentence": "the cat sat"}])

        `ensemble` averages over the prompts that the run's ensembles average over; `backbone` is the place of the model, if it is
        not where the run had it. Raises ConfigError for a task without a prompt.
        """
        from bpt_dist.library.prompts import predictor_of

        return predictor_of(self.folder, task, ensemble=ensemble, backbone=backbone)

    def pictures(self) -> dict[str, Picture]:
        """Return the pictures by name, drawn now where they are missing. Raises DataError where there is nothing to draw."""
        folder = self.folder / layout.FIGURES
        if not (files := sorted(folder.glob("*.png"))):
            from bpt_dist.artifacts.figures import draw_run
            from bpt_dist.storage.metrics_log import iter_records
            from bpt_dist.storage.snapshots import with_snapshots

            files = draw_run(list(with_snapshots(iter_records(self.folder / layout.METRICS), self.folder)), folder)
        if not files:
            raise DataError(f"{self.folder}: there is nothing to draw; no stage of the run has taken a step")
        return {file.stem: Picture(file) for file in files}

    def _repr_html_(self) -> str:
        config = self.config
        facts = {
            "run": self.name, "method": config.method.name, "backbone": config.backbone.path, "seed": str(config.seed),
            "folder": str(self.folder),
        }  # fmt: skip
        drawn = sorted((self.folder / layout.FIGURES).glob("*.png"))
        shown = [file for name in FIRST_PICTURES for file in drawn if file.stem == name][:1]
        return facts_html(facts) + self.results._repr_html_() + "".join(map(picture_html, shown))


class Runs(Sequence[Run]):
    """The runs of a configuration with `rows` or `seeds`, in its order."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = tuple(runs)

    @overload
    def __getitem__(self, place: int) -> Run: ...

    @overload
    def __getitem__(self, place: slice) -> Runs: ...

    def __getitem__(self, place: int | slice) -> Run | Runs:
        return Runs(self._runs[place]) if isinstance(place, slice) else self._runs[place]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"<{len(self)} runs: {', '.join(run.name for run in self)}>"

    @property
    def results(self) -> Results:
        """The scores of all runs."""
        return Results(result for run in self for result in run.results)

    def table(self, *, split: str = "test", metrics: Sequence[str] = (), rows: Sequence[str] = ()) -> Table:
        """Return the results table, a row for each label of the configuration; `rows` as in `compare`."""
        return _table(self, rows, split, metrics)

    def _repr_html_(self) -> str:
        html: str = self.table()._repr_html_()
        return html


def compare(*given: Run | Runs | str | Path, rows: Sequence[str] = (), split: str = "test", metrics: Sequence[str] = ()) -> Table:
    """Return one table of several runs, with sentences below it that say whether one row is better than another.

        bpt_dist.compare(run, other, rows=["bpt:vanilla_transfer@mood"])

    A row is the name of its runs without `-s<seed>`. `rows` names pairs, `FIRST:SECOND` or `FIRST:SECOND@TASK,TASK`, or one row
    that is compared with all others; without it, two rows are compared and more are not. Raises ConfigError for a row that is
    not there, DataError for a split or metric that was not measured.
    """
    runs: list[Run] = []
    for one in given:
        runs += [one] if isinstance(one, Run) else one if isinstance(one, Runs) else [Run.open(one)]
    if not runs:
        raise ConfigError("compare: no run is given; give runs or their folders")
    labels = list(dict.fromkeys(row_label(run.config) for run in runs))
    pairs = rows or ([":".join(labels)] if len(labels) == PAIR else ())
    return _table(runs, pairs, split, metrics)


def _table(runs: Sequence[Run], rows: Sequence[str], split: str, metrics: Sequence[str]) -> Any:
    from bpt_dist.commands.table.table import Table

    found = collect([run.folder for run in runs])
    try:
        return Table.build(found.results, split=split, notes=found.notes, metrics=metrics, by_label=True, compared=[*rows])
    except ConfigError as error:  # it names the option of the command
        raise ConfigError(str(error).replace("--compare", "rows:", 1)) from None
