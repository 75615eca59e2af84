"""MLflow as a mirror of the run directory.

`metrics.jsonl`, `system.jsonl`, `figures/`, `results.json` and `status.json` are the truth. A process of its own (a thread
would take the interpreter lock from the training step) tails them and keeps in `tracking.json` what the store
has: for each metric the last step `sent`, and before every batch what is in flight. A crash or an outage between the two
is settled by asking the store, so nothing is lost or doubled. MLflow is never asked whether or where to
resume.
"""

from __future__ import annotations

import fcntl
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.files import read_json, write_json_atomic
from bpt_dist.journal import MetricsLog, read_records
from bpt_dist.lock import holder_of
from bpt_dist.tracking_models import register_prompts
from bpt_dist.tracking_store import Point, connect, log_batch, reach, sqlite_path, store_lock

__all__ = ["MetricsLog", "Request", "Sender", "Summary", "connect", "parameters", "sync"]

LOGS = ("metrics.jsonl", "system.jsonl")
LARGEST_BATCH = 1000  # of the MLflow API
LONGEST_PARAMETER = 500
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#b5651d", "#5c677d")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where a run is mirrored to and under which name; `id` is that of `run.json` and finds the run again.

    With an `alias` the prompts of the run, once it is finished, become versions of registered models under it.
    """

    id: str
    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    alias: str | None = None


@dataclass(frozen=True)
class Summary:
    """What `sync` did: points sent now, and under which MLflow run."""

    points: int
    run_id: str
    experiment_id: str
    uri: str


def parameters(config: Mapping[str, Any], *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Flatten a configuration to dotted names; `leave_out` names sections or keys that explain no result.

    Logarithms of sigma are added because the axes of MLflow's charts are linear. Nothing is cut: longer
    values stay in the artifact `config.yaml` only.
    """
    found: dict[str, str] = {}
    for name, value in _leaves("", config):
        skipped = any(name == out or name.startswith(f"{out}.") for out in leave_out)
        if skipped or value is None or len(str(value)) > LONGEST_PARAMETER:
            continue
        found[name] = str(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and value > 0 and (logged := log10_name(name)):
            found[logged] = f"{math.log10(value):.6g}"
    return found


def log10_name(name: str) -> str | None:
    """Return the name of the logarithm that is logged beside a sigma, None for every other parameter."""
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}log10_{last}" if last in ("sigma", "sigma_relative") else None


class Sender:
    """Bring one run directory's MLflow run up to date; one sender a directory at a time (`tracking.lock`)."""

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
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StorageError(f"{folder}: another process is sending this run to the tracking store") from error
        self.state: dict[str, Any] = {"run_id": None, **_nothing_sent()}
        self.state |= read_json(folder / "tracking.json")
        if request is not None:
            self._adopt(request)

    def pump(self) -> None:
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
        self.pump()
        self._send_files()
        state = self._true_state()
        if state is not None:
            self._client.set_terminated(self.state["run_id"], STATUS.get(state, "KILLED"))
        if state == "finished" and self.state.get("alias"):
            self.report("opening")
            register_prompts(self.folder, alias=self.state["alias"])

    def is_settled(self) -> bool:
        """Whether the run directory says how the run ended."""
        return self._true_state() is not None

    def close(self) -> None:
        """Let another sender in."""
        self._lock.close()

    def _adopt(self, request: Request) -> None:
        if self.state["uri"] != request.uri:
            self.state |= {"run_id": None, **_nothing_sent()}
        self.state |= asdict(request) | {"resumes": self.state.get("resumes", -1) + 1}

    def _true_state(self) -> str | None:
        path = self.folder / "status.json"
        state = read_json(path)["state"] if path.exists() else "created"
        if state in STATUS:
            return state
        return None if holder_of(self.folder) else "killed"

    def _open_run(self) -> None:
        # Before mlflow is imported (seconds): a server that is down must not delay the end of a short run.
        reach(self.state["uri"])
        self.report("loading")
        client = connect(self.state["uri"])
        self.report("opening" if sqlite_path(self.state["uri"]) else "sending")
        if self.state["run_id"] is None:
            self._create_run(client)
        run_id = self.state["run_id"]
        run = client.get_run(run_id)
        tags, known = self.state["tags"], run.data.params
        new = {name: value for name, value in self.state["params"].items() if name not in known}
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

    def _create_run(self, client: Any) -> None:
        with store_lock(self.state["uri"]):
            experiment = client.get_experiment_by_name(self.state["experiment"])
            experiment_id = experiment.experiment_id if experiment else self._create_experiment(client)
        # The tag finds a run whose sender ended between creating it and writing its id down.
        mine = client.search_runs([experiment_id], f"tags.`bpt.run_id` = '{self.state['id']}'", max_results=1)
        if mine:
            run = mine[0]
        else:
            color = COLORS[sum(self.state["run_name"].encode()) % len(COLORS)]
            tags = {"bpt.run_id": self.state["id"], "mlflow.runColor": color}
            run = client.create_run(experiment_id, tags=tags, run_name=self.state["run_name"])
        self.state |= {"run_id": run.info.run_id, "experiment_id": experiment_id}
        self._save()

    def _create_experiment(self, client: Any) -> str:
        store = sqlite_path(self.state["uri"])
        # Beside the database: MLflow's default is relative to the working directory of whoever comes first.
        location = None if store is None else (store.parent / "mlartifacts" / self.state["experiment"]).as_uri()
        return client.create_experiment(self.state["experiment"], artifact_location=location)

    def _send_tags(self) -> None:
        """`tags.json` holds what is known of a run beside its configuration: the sweep it belongs to, why it was ended."""
        path = self.folder / "tags.json"
        tags = read_json(path) if path.is_file() else {}
        if tags != self.state["more_tags"]:
            log_batch(self._client, self.state["run_id"], tags=tags)
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
        for path in sorted((self.folder / "figures").glob("*/step-*.png")):
            key, step = path.parent.name, int(path.stem.removeprefix("step-"))
            if step > self.state["images"].get(key, -1):
                import PIL.Image

                self.report("sending")
                with PIL.Image.open(path) as image:
                    self._client.log_image(self.state["run_id"], image, key=key, step=step, synchronous=True)
                self.state["images"][key] = step
                self._save()

    def _send_files(self) -> None:
        records = [self.folder / name for name in ("config.yaml", "run.json", "results.json")]
        for path in [*records, *self.folder.glob("figures/*.png")]:
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
        write_json_atomic(self.folder / "tracking.json", self.state)


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
    if not (folder / "tracking.json").exists():
        raise ConfigError(f"{folder}: has no tracking.json; only a run with tracking.mlflow: true can be sent")
    sender = Sender(folder)
    try:
        sender.finish()
    except StorageError:
        raise
    except Exception as error:
        place = sender.state["uri"]
        raise StorageError(f"{place}: {_short(error)}; start the server, then run the command again") from error
    finally:
        sender.close()
    state = sender.state
    return Summary(sender.points, state["run_id"], state["experiment_id"], state["uri"])


def _ends_a_line(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        return offset == 0 or file.read(1) == b"\n"


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), entry)
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, value


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
