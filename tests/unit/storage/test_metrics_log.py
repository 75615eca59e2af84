"""`metrics.jsonl` has each step once, in order, as valid JSON, whatever happened before."""

import errno
import json
import math
import os
import random

import pytest

from bpt_dist.errors import StorageError
from bpt_dist.storage.metrics_log import MetricsLog, iter_records, read_records


def record(step, **metrics):
    return {"step": step, "stage": "source", "metrics": {"source/loss": 1 / (step + 1), **metrics}}


def steps(path):
    return [entry["step"] for entry in read_records(path)[0]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_resume_cuts_back_to_the_checkpoint(path):
    log = MetricsLog(path)
    for step in range(6):
        log.append(record(step))
    log.flush()
    position = log.position()
    for step in range(6, 9):
        log.append(record(step))
    del log  # killed: nothing is closed
    log = MetricsLog(path)
    log.cut(position)
    for step in range(6, 12):
        log.append(record(step))
    log.close()
    assert steps(path) == list(range(12))


def test_a_torn_last_line_is_dropped_at_every_cut(path):
    log = MetricsLog(path)
    log.append(record(0))
    whole = log.position()
    log.append(record(1, note=0.5))
    log.close()
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        log = MetricsLog(path)
        assert log.position() == whole
        log.append(record(1))
        log.close()
        assert steps(path) == [0, 1]


def test_a_torn_line_longer_than_one_block_is_dropped(path):
    path.write_bytes(b'{"step":0}\n' + b"x" * 200_000)
    log = MetricsLog(path)
    assert log.position() == 11
    log.close()


def test_cut_only_shrinks(path):
    log = MetricsLog(path)
    log.append(record(0))
    for position in (log.position() + 1, log.position() - 1):
        with pytest.raises(StorageError, match="no line end"):
            log.cut(position)
    log.cut(0)
    assert path.read_bytes() == b""
    log.close()


def test_what_is_not_a_finite_number_becomes_null(path):
    log = MetricsLog(path)
    log.append(record(0, a=float("nan"), b=float("-inf"), c=[[1.0, float("inf")]]))
    log.close()
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["metrics"] == {"source/loss": 1.0, "a": None, "b": None, "c": [[1.0, None]]}
    assert line["time"].endswith("+00:00")


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    log = MetricsLog(path)
    log.append(record(0))
    real, failures = os.write, [1, 1]

    def full(descriptor, data):
        if failures:
            failures.pop()
            real(descriptor, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="free some space"):
        log.append(record(1))
    assert steps(path) == [0]
    log.append(record(1))
    log.close()
    assert steps(path) == [0, 1]


def test_reading_while_it_grows_returns_every_record_once(path):
    rng = random.Random(1)
    log = MetricsLog(path)
    for step in range(200):
        log.append(record(step, pad=[0.0] * rng.randrange(40)))
    log.close()
    data, seen, position = path.read_bytes(), [], 0
    for size in [*sorted(rng.randrange(len(data)) for _ in range(60)), len(data)]:
        path.write_bytes(data[:size])
        while True:
            records, position = read_records(path, position, limit=500)
            if not records:
                break
            seen += [entry["step"] for entry in records]
    assert seen == list(range(200))


def test_a_file_longer_than_one_read_is_read_to_its_end(path):
    """Validations come last: a score that is behind what one read returns is a score all the same."""
    log = MetricsLog(path)
    for step in range(12):
        log.append(record(step, pad=[0.5] * 200_000))  # a megabyte a line
    log.close()
    first, end = read_records(path)
    assert 0 < len(first) < 12
    assert end < path.stat().st_size
    assert [entry["step"] for entry in iter_records(path)] == list(range(12))


def test_a_line_longer_than_one_read_is_one_record(path):
    log = MetricsLog(path)
    log.append(record(0, pad=[0.5] * 1_200_000))
    log.append(record(1))
    log.close()
    assert path.stat().st_size > 1 << 22
    assert [entry["step"] for entry in iter_records(path)] == [0, 1]


def test_costs_do_not_move_the_position(tmp_path):
    """Checkpoints and results hold positions: a run that was killed would end with other bits than an undisturbed one."""
    sizes = []
    for number, cost in enumerate((0.5, 12.3456789, 1e-300, -1.2345678901234567e-308, 0.1 + 0.2, 1234567, float("nan"))):
        log = MetricsLog(tmp_path / f"{number}.jsonl")
        log.append({"step": 1, "stage": "source", "metrics": {"source/loss": 0.5, "source/cost/seconds_per_step": cost}})
        sizes.append(log.position())
        log.close()
        (record,) = iter_records(tmp_path / f"{number}.jsonl")
        assert record["metrics"]["source/cost/seconds_per_step"] == (cost if math.isfinite(cost) else None)
    assert len(set(sizes)) == 1
