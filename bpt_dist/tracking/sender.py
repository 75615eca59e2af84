"""MLflow as a mirror of the run directory.

The source is the run directory: `metrics.jsonl`, `system.jsonl`, `figures/`, `results.json` and `status.json`. A separate process
tails them (a thread would take the interpreter lock from the training step). `tracking.json` records what the store has: the last
step `sent` of each metric and, before every batch, what is in flight. After a crash or an outage between the two the store is
asked, so nothing is lost or doubled. MLflow is never asked whether or where to resume.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bpt_dist.errors import ConfigError, StorageError, UserError
from bpt_dist.storage import layout
from bpt_dist.storage.file_system import NoFileLocks, lock_file
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.lock import holder_of
from bpt_dist.storage.metrics_log import read_records
from bpt_dist.storage.run_directory import read_status
from bpt_dist.tracking.answer import ask, deleted_run, explain
from bpt_dist.tracking.names import COLOR, ROW, SWEPT, axes, color_of
from bpt_dist.tracking.places import artifact_location, check_recorded, recorded_uri, sqlite_path
from bpt_dist.tracking.registry import register_prompts
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.store import Point, connect, log_batch, store_lock

LOGS = (layout.METRICS, "system.jsonl")
LARGEST_BATCH = 1000  # of the MLflow API
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
MOST_RUNS = 1000  # of an experiment that are looked at for the colours they have
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What `sync` did: points sent now, and under which MLflow run."""

    points: int
    run_id: str
    experiment_id: str
    uri: str


class Sender:
    """Bring the MLflow run of a run directory up to date; one sender for a directory at a time (`tracking.lock`)."""

    def __init__(
        self,
        folder: Path,
        request: Request | None = None,
        *,
        report: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.folder, self.report = folder, report
        self.points = 0
        self._client: Any = None
        self._offsets: dict[str, int] = {}
        self._lock = (folder / "tracking.lock").open("w")
        try:
            lock_file(self._lock, wait=False)
        except BlockingIOError as error:
            self._lock.close()
            raise StorageError(f"{folder}: another process is sending this run to the tracking store") from error
        except NoFileLocks:
            # The store is elsewhere, see `Mirror`. Only the lock of the run tells this sender from that of a live run.
            if request is None and holder_of(folder) is not None:
                self._lock.close()
                raise StorageError(f"{folder}: the run is alive and sends itself; wait for its end") from None
        self.state: dict[str, Any] = {"run_id": None, **_nothing_sent()}
        self.state |= read_json(folder / layout.TRACKING)
        # The same store where both were moved: what was sent is in it.
        self.state |= {"uri": recorded_uri(folder), "folder": str(folder.resolve())}
        if request is not None:
            self._set_request(request)

    def send_pending(self) -> None:
        """Send what is new: metrics, then pictures. Raises whatever MLflow raises."""
        try:
            if self._client is None:
                self._open_run()
            self._send_tags()
            for name in LOGS:
                self._send_metrics(name)
            self._send_pictures()
        except BaseException:
            # What was read and did not arrive has to be read again, and what may have arrived the store is asked for.
            self._client, self._offsets = None, {}
            raise

    def finish(self) -> None:
        """Send everything, then the files, then the true status (none while the run is alive); register finished prompts."""
        self.send_pending()
        self._send_files()
        state = self._true_state()
        if state is not None:
            self._client.set_terminated(self.state["run_id"], STATUS.get(state, "KILLED"))
        if state == "finished" and self.state.get("alias"):
            self.report("opening")
            register_prompts(self.folder, alias=self.state["alias"])

    def has_ended(self) -> bool:
        """Whether the run directory says how the run ended."""
        return self._true_state() is not None

    def close(self) -> None:
        """Release the lock, so that another sender can work."""
        self._lock.close()

    def _set_request(self, request: Request) -> None:
        if self.state["uri"] != request.uri:
            self.state |= {"run_id": None, **_nothing_sent()}
        self.state |= asdict(request) | {"resumes": self.state.get("resumes", -1) + 1}

    def _true_state(self) -> str | None:
        status = read_status(self.folder)
        if status is None:
            return None if holder_of(self.folder) else "killed"
        return "killed" if status.killed else status.state if status.state in STATUS else None

    def _open_run(self) -> None:
        # Before mlflow is imported (seconds): a server that is down must not delay the end of a short run, and one that refuses is
        # said while the run is young.
        ask(self.state["uri"], self.state["experiment"])
        self.report("loading")
        client = connect(self.state["uri"])
        self.report("opening" if sqlite_path(self.state["uri"]) else "sending")
        if self.state["run_id"] is None:
            self._create_run(client)
        run = self._find_run(client)
        run_id = run.info.run_id
        tags, stored = self.state["tags"], run.data.params
        new = {name: value for name, value in self.state["params"].items() if name not in stored}
        log_batch(client, run_id, params=new, tags={**tags, "bpt.resumes": str(self.state.get("resumes", 0))})
        if self._true_state() is None and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        # What was in flight when a sender ended: the store knows how far it came.
        for key, step in self.state["sending"].items():
            arrived = [point.step for point in client.get_metric_history(run_id, key)]
            self.state["sent"][key] = max([*arrived, self.state["sent"].get(key, -1)])
            log.debug("%s: %s of %s arrived", key, max(arrived, default=None), step)
        self.state["sending"] = {}
        self._save()
        self._client = client

    def _find_run(self, client: Any) -> Any:
        """Return the MLflow run; one that is not in the store any more is made again and gets everything."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(self.state["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.state |= {"run_id": None, **_nothing_sent()}
            self._create_run(client)
            run = client.get_run(self.state["run_id"])
        if run.info.lifecycle_stage == "deleted":
            raise deleted_run(run.info.run_id, self.folder, self.state["uri"])
        return run

    def _create_run(self, client: Any) -> None:
        with store_lock(self.state["uri"]):
            experiment = client.get_experiment_by_name(self.state["experiment"])
            experiment_id = experiment.experiment_id if experiment else self._create_experiment(client)
            # The tag finds a run whose sender ended between creating it and writing its id down.
            mine = client.search_runs([experiment_id], f"tags.`bpt.run_id` = '{self.state['id']}'", max_results=1)
            run = mine[0] if mine else self._new_run(client, experiment_id)
        self.state |= {"run_id": run.info.run_id, "experiment_id": experiment_id}
        self._save()

    def _new_run(self, client: Any, experiment_id: str) -> Any:
        """Make the MLflow run in the colour of its row; the lock of the store keeps two rows from taking one colour."""
        others = client.search_runs([experiment_id], order_by=["attributes.start_time ASC"], max_results=MOST_RUNS)
        row = self.state["tags"].get(ROW, self.state["run_name"])
        color = color_of(row, [run.data.tags for run in others])
        tags = {"bpt.run_id": self.state["id"], ROW: row, COLOR: color}
        return client.create_run(experiment_id, tags=tags, run_name=self.state["run_name"])

    def _create_experiment(self, client: Any) -> str:
        # Beside the database: MLflow's default is relative to the working directory of the process that comes first.
        location = artifact_location(self.state["uri"], self.state["experiment"])
        return client.create_experiment(self.state["experiment"], artifact_location=location)

    def _send_tags(self) -> None:
        """Send `tags.json`: what is known of a run beside its configuration, such as its sweep and why it was ended."""
        path = self.folder / "tags.json"
        tags = read_json(path) if path.is_file() else {}
        if tags != self.state["more_tags"]:
            log_batch(self._client, self.state["run_id"], tags=tags, params=axes(tags.get(SWEPT, ""), self.state["params"]))
            self.state["more_tags"] = tags
            self._save()

    def _send_metrics(self, name: str) -> None:
        path = self.folder / name
        offset = self._offsets.get(name, 0)
        if path.exists() and not _ends_a_line(path, offset):
            offset = 0  # cut back by a resume, perhaps longer again since; the marks below skip what was sent
        while True:
            records, offset = read_records(path, offset)
            self._offsets[name] = offset
            if not records:
                return
            batch: list[Point] = []
            for record in records:
                points = self._new_points(record)
                if len(batch) + len(points) > LARGEST_BATCH:
                    self._send_batch(batch)
                    batch = []
                batch += points
            self._send_batch(batch)

    def _new_points(self, record: dict[str, Any]) -> list[Point]:
        milliseconds = int(datetime.fromisoformat(record["time"]).timestamp() * 1000)
        points = []
        for name, value in record.get("metrics", {}).items():
            key, step = metric_key(record["stage"], name), int(record["step"])
            if isinstance(value, (int, float)) and step > self.state["sent"].get(key, -1):
                points.append((key, float(value), milliseconds, step))
        # The compare page opens on the metric that was logged first.
        return sorted(points, key=lambda point: not point[0].startswith("best/"))

    def _send_batch(self, batch: list[Point]) -> None:
        for start in range(0, len(batch), LARGEST_BATCH):
            self.report("sending")
            part = batch[start : start + LARGEST_BATCH]
            self.state["sending"] = {key: step for key, _, _, step in part}
            self._save()
            log_batch(self._client, self.state["run_id"], points=part)
            self.points += len(part)
            self.state["sent"] |= self.state["sending"]
            self.state["sending"] = {}
            self._save()

    def _send_pictures(self) -> None:
        """`figures/<key>/step-<n>.png` is one frame of the picture series `<key>`."""
        for path in sorted((self.folder / layout.FIGURES).glob("*/step-*.png")):
            key, step = path.parent.name, int(path.stem.removeprefix("step-"))
            if step > self.state["images"].get(key, -1):
                import PIL.Image

                self.report("sending")
                with PIL.Image.open(path) as image:
                    self._client.log_image(self.state["run_id"], image, key=key, step=step, synchronous=True)
                self.state["images"][key] = step
                self._save()

    def _send_files(self) -> None:
        records = [self.folder / name for name in (layout.CONFIG, layout.RUN, layout.RESULTS, layout.INPUTS)]
        for path in [*records, *self.folder.glob(f"{layout.FIGURES}/*.png")]:
            name = path.relative_to(self.folder)
            if not path.is_file():
                continue
            version = [path.stat().st_size, path.stat().st_mtime_ns]
            if self.state["files"].get(str(name)) != version:
                self.report("sending")
                parent = None if name.parent == Path() else str(name.parent)
                self._client.log_artifact(self.state["run_id"], str(path), parent)
                self.state["files"][str(name)] = version
                self._save()

    def _save(self) -> None:
        write_json_atomic(self.folder / layout.TRACKING, self.state)


def _nothing_sent() -> dict[str, Any]:
    return {"sent": {}, "sending": {}, "images": {}, "files": {}, "more_tags": {}}


def metric_key(stage: str, name: str) -> str:
    """Return a metric's name in MLflow: `target/loss` of stage `target/boolq` becomes `target/boolq/loss`.

    Every other name must belong to one stage only, for its steps are the axis.
    """
    head, _, rest = name.partition("/")
    key = f"{stage}/{rest}" if head == "target" and stage.startswith("target/") else name
    return re.sub(r"[^\w\-. :/]", "_", key)


def sync(folder: Path) -> Summary:
    """Send what the mirror of a run could not. Raises StorageError if the store fails."""
    if not (folder / layout.TRACKING).exists():
        raise ConfigError(f"{folder}: has no {layout.TRACKING}; only a run with tracking.mlflow: true can be sent")
    sender = Sender(folder)
    try:
        check_recorded(folder, sender.state["uri"])
        sender.finish()
    except UserError:
        raise
    except Exception as error:
        cause = explain(error, sender.state["uri"], sender.state["experiment"])
        raise StorageError(f"{cause}, then run the command again") from error
    finally:
        sender.close()
    state = sender.state
    return Summary(sender.points, state["run_id"], state["experiment_id"], state["uri"])


def _ends_a_line(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        return offset == 0 or file.read(1) == b"\n"
