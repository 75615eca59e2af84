"""What the README shows is what comes: the quick start, much shortened, line by line; and its commands that look at runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROGRAM = """
import sys
from pathlib import Path
from launcher import quickstart
quickstart.CONFIG = Path(sys.argv[1])
sys.exit(quickstart.main())
"""
SECONDS = 1500
pytestmark = pytest.mark.timeout(SECONDS + 300)
NUMBER = r"-?[\d,]+(?:\.\d+)?"


def shape(line: str) -> str:
    """Return a pattern for a line of the README: `…` is any text, a number any number, perhaps the best of its column.

    Which run of how many a line is about has to be the same; folders may be elsewhere.
    """
    parts = []
    for text in re.split(rf"(…|^\d+/3 \S+|{NUMBER})", line):
        if text == "…":
            parts.append(".*")
        elif re.fullmatch(NUMBER, text):
            parts.append(rf"\*{{0,2}}{NUMBER}\*{{0,2}}")
        else:
            parts.append(re.sub(r"(?:\.|\w)*(runs|configs)/", r"\\S*\1/", re.escape(text)))
    return "".join(parts)


def shown() -> list[str]:
    """Return the lines of the README that the quick start ends with."""
    (block,) = re.findall(r"It ends like this:\n\n```\n(.*?)```", README, re.DOTALL)
    return [line.rstrip() for line in block.splitlines()]


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder and the lines of a quick start with few steps and rows; the runs, methods and tasks are those shipped."""
    folder = tmp_path_factory.mktemp("quickstart")
    plain = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    plain["output"] = str(folder / "runs")
    plain["data"] |= {"max_train_rows": 60, "max_eval_rows": 20}
    for stage in ("source", "target"):
        plain[stage] |= {"steps": 4, "log_every": 2, "checkpoint_every": 4}
    plain["target"]["eval_every"] = 2
    plain["figures"] = False
    plain["distribution"] = {"step_timeout": 600}  # machines that test have other work
    file = folder / "configs" / "quickstart.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-c", PROGRAM, str(file)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = job.communicate(timeout=SECONDS)
    finally:
        job.terminate()  # it passes the signal on to all its processes
        job.wait()
    assert job.returncode == 0, out + err
    return folder, [*err.splitlines(), *out.splitlines()]


def test_the_quick_start_prints_what_the_readme_shows(quick_start: tuple[Path, list[str]]) -> None:
    _, lines = quick_start
    kept = [line for line in shown() if line and line != "…"]
    assert len(kept) > 15
    missing = [line for line in kept if not any(re.fullmatch(shape(line), found.rstrip()) for found in lines)]
    assert missing == []


def test_no_line_of_a_run_is_printed_twice(quick_start: tuple[Path, list[str]]) -> None:
    _, lines = quick_start
    of_runs = [line for line in lines if re.match(r"(\d+/3 )?\w+-s\d \|", line)]
    assert len(of_runs) > 50
    assert len(set(of_runs)) == len(of_runs)


@pytest.mark.parametrize(
    "words",
    [["table", "runs"], ["table", "runs", "--format", "latex"], ["plot", "runs/quickstart/bpt-s0"],
     ["export", "runs/quickstart/bpt-s0"], ["example", "gaussian-product"]],
    ids=" ".join,
)  # fmt: skip
def test_the_commands_that_look_at_runs_work(quick_start: tuple[Path, list[str]], words: list[str]) -> None:
    folder, _ = quick_start
    assert f"bpt-dist {words[0]} {words[1]}".replace("quickstart/bpt-s0", "NAME") in README
    command = [str(Path(sys.executable).parent / "bpt-dist"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("program", ["deepspeed", "torchrun"])
def test_launchers_know_the_options_the_documents_give_them(program: str) -> None:
    import command_lines

    lines = [line for line in command_lines.lines() if line.words[0] == program]
    command = [str(Path(sys.executable).parent / program), "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in lines:
        words = line.words[: line.words.index("launcher/train.py")] if "launcher/train.py" in line.words else line.words
        assert [word for word in words if word.startswith("--") and word not in known] == [], line
