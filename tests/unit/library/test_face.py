"""`import bpt_dist` is light, its names are there, and `bpt_dist.train` is both the module of the story and the function."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import bpt_dist
import bpt_dist.library.runs as home

ROOT = Path(__file__).parents[3]
HEAVY = set("torch numpy transformers deepspeed mlflow ray peft datasets matplotlib scipy sklearn pydantic".split())
SECONDS = 0.3  # measured 0.02; a loaded machine takes longer


def in_a_new_process(code: str) -> dict:
    """Return the JSON that `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_import_is_light() -> None:
    code = "import json, sys, time; t = time.perf_counter(); import bpt_dist; s = time.perf_counter() - t\n"
    code += "print(json.dumps({'seconds': s, 'modules': sorted({m.split('.')[0] for m in sys.modules})}))"
    found = min((in_a_new_process(code) for _ in range(3)), key=lambda one: one["seconds"])
    assert not HEAVY & set(found["modules"])
    assert found["seconds"] < SECONDS


@pytest.mark.parametrize(
    "used",
    [
        "bpt_dist.__version__",
        "bpt_dist.ConfigError, bpt_dist.Stopped, bpt_dist.UserError",
        "bpt_dist.Run, bpt_dist.Runs, bpt_dist.compare",
        "bpt_dist.Task('t', [{'x': 'a', 'y': 0}], [{'x': 'b', 'y': 1}], fields=['x'], label='y', label_words=['n', 'p'])",
    ],
)
def test_torch_waits_until_it_is_needed(used: str) -> None:
    found = in_a_new_process(f"import bpt_dist, json, sys; {used}; print(json.dumps(sorted(sys.modules)))")
    assert "torch" not in found


def test_every_name_is_there_and_listed() -> None:
    for name in bpt_dist.__all__:
        assert getattr(bpt_dist, name) is not None, name
    assert set(bpt_dist.__all__) <= set(dir(bpt_dist))
    assert bpt_dist.Run is home.Run
    assert bpt_dist.__version__ == version("bpt_dist")


def test_what_is_not_there_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = bpt_dist.trian
    with pytest.raises(ImportError):
        from bpt_dist import nothing_of_the_kind  # noqa: F401


@pytest.mark.parametrize(
    "first", ["import bpt_dist.train", "from bpt_dist import train", "import bpt_dist; bpt_dist.train", "pass"]
)
def test_train_is_the_module_and_the_function_in_any_order_of_imports(first: str) -> None:
    code = f"{first}\nimport bpt_dist, json, sys\nfrom bpt_dist.train import run_stage\n"
    code += "try:\n  bpt_dist.train('no-such.yaml')\nexcept bpt_dist.ConfigError as error:\n  said = str(error)\n"
    code += "print(json.dumps([said, bpt_dist.train is sys.modules['bpt_dist.train'], bpt_dist.train.run_stage is run_stage]))"
    said, same, whole = in_a_new_process(code)
    assert said.startswith("no-such.yaml: no such configuration file")
    assert same
    assert whole
