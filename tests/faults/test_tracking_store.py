"""F12: a process killed while it makes the tables of a new MLflow store leaves nothing that later ones cannot open."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_figures import record_figure

from bpt_dist.tracking.store import connect

CONNECT = "import sys; from bpt_dist.tracking.store import connect; connect(sys.argv[1])"


def killed_while_making(folder: Path, num_bytes: int) -> int:
    """Kill a process once the tables it makes fill so many bytes; return how many they were."""
    process = subprocess.Popen([sys.executable, "-c", CONNECT, f"sqlite:///{folder / 'mlflow.db'}"], stderr=subprocess.DEVNULL)
    try:
        making, until = folder / "mlflow.db.making", time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            size = making.stat().st_size if making.exists() else 0
            if size >= num_bytes:
                return size
            time.sleep(0.001)
        pytest.fail(f"no {num_bytes} bytes of tables were made; the process ended with {process.poll()}")
    finally:
        process.kill()
        process.wait()


def test_a_store_is_whole_or_not_there(tmp_path: Path) -> None:
    sizes = [killed_while_making(tmp_path, num_bytes) for num_bytes in (1, 60_000, 200_000)]
    assert not (tmp_path / "mlflow.db").exists()
    client = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.create_experiment("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    record_figure("F12", "killed while the MLflow store was made", trials=len(sizes), passed=len(sizes))
