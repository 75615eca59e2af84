"""The wheel in an environment of its own, as somebody has it who installs the package and has no checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(folder: Path) -> Path:
    """Build the wheel and return the folder of programs of an environment that has it, and beside it our dependencies only."""
    tree = folder / "tree"
    left = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=left)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(tree)], check=True)
    venv.create(folder / "env", symlinks=True)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    # A plain line adds the folder and does not read the .pth files in it, so that no editable install is seen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
    deepspeed = python.with_name("deepspeed")  # pip would put it there with its package
    deepspeed.write_text(f"#!{python}\nfrom deepspeed.launcher.runner import main\nmain()\n")
    deepspeed.chmod(0o755)
    return python.parent
