"""Every command line of the documents is understood: options, files, targets of make, configurations with their overrides."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import command_lines
import pytest
import typer
from command_lines import ROOT, Line

from bpt_dist import config as configuration
from bpt_dist.commands import train
from bpt_dist.commands.main import app
from bpt_dist.commands.sweep import settings as sweeps
from launcher import sweep

LINES = command_lines.lines()
# Made by the reader, or by an earlier command of the same page.
MADE = {
    "invent.py", "ask.py",
    ".venv/bin/activate", "hostfile", "data", "runs/world", "runs/mini-1/backbone", "runs/evidence-separate-prompts",
    "runs/quickstart", "runs/quickstart-1", "runs/quickstart-1-two,runs/quickstart-1",
}  # fmt: skip


def of(*programs: str) -> list[Line]:
    return [line for line in LINES if line.words[0] in programs]


def launched(line: Line, script: str) -> list[str] | None:
    """Return the words after a script of ours, None where it is not in the line."""
    return list(line.words[line.words.index(script) + 1 :]) if script in line.words else None


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_lines_of_all_pages_are_found() -> None:
    programs = [line.words[0] for line in LINES]
    assert {name: programs.count(name) >= least for name, least in (("bpt-dist", 25), ("deepspeed", 4), ("torchrun", 2),
                                                                    ("python", 4), ("make", 6))} == dict.fromkeys(
        ("bpt-dist", "deepspeed", "torchrun", "python", "make"), True)  # fmt: skip
    pages = {line.page for line in LINES}
    assert pages >= {"README.md", "docs/distributed_memory.md", "docs/hosts.md", "docs/sweeps.md", "configs/quickstart.yaml"}


def with_written_files(line: Line, folder: Path) -> list[str]:
    """Return the words of a line; a file that an earlier block of its page writes is in the folder."""
    written = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", (ROOT / line.page).read_text(), re.MULTILINE | re.DOTALL))
    for name in written.keys() & set(line.words):
        (folder / name).write_text(written[name])
    return [str(folder / word) if word in written else word for word in line.words]


@pytest.mark.parametrize("line", of("bpt-dist"), ids=str)
def test_bpt_dist_understands_its_lines(line: Line, tmp_path: Path) -> None:
    command, words = typer.main.get_command(app), with_written_files(line, tmp_path)[1:]
    names = ["bpt-dist"]
    while isinstance(command, typer.core.TyperGroup) and words and not words[0].startswith("-"):
        names.append(words[0])
        found = command.get_command(typer.Context(command), words.pop(0))
        assert found is not None, f"{' '.join(names)}: no such command"
        command = found
    if words in (["--help"], ["--version"]) or (
        words in ([], ["--quick"]) and names[-1] in ("plan", "memory", "run-table", "sync", "eval")
    ):  # the page speaks of the command itself
        return
    context = command.make_context(" ".join(names), words, resilient_parsing=False)
    given = {key: value for key, value in context.params.items() if value is not None}
    if isinstance(given.get("config"), Path):
        overrides = [word for word in given.get("overrides") or [] if "runs/world/" not in word]
        assert configuration.load(given["config"], overrides)


@pytest.mark.parametrize("line", [line for line in LINES if launched(line, "launcher/train.py") is not None], ids=str)
def test_the_launcher_understands_what_follows_it(line: Line) -> None:
    options = train.parser().parse_args(launched(line, "launcher/train.py"))
    assert configuration.expand(configuration.load(options.config, options.overrides))


@pytest.mark.parametrize("line", [line for line in LINES if launched(line, "launcher/sweep.py") is not None], ids=str)
def test_sweeps_understand_what_follows_them(line: Line) -> None:
    options = sweep.parser().parse_args(launched(line, "launcher/sweep.py"))
    assert sweeps.load(options.config, options.overrides).num_settings


@pytest.mark.parametrize("line", of("make"), ids=str)
def test_targets_of_make_exist(line: Line) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(word for word in line.words[1:] if "=" not in word) <= set(targets)


@pytest.mark.parametrize("line", of("python", "cp", "source", "sbatch", "kubectl", "pytest"), ids=str)
def test_files_and_modules_of_a_line_exist(line: Line) -> None:
    if line.words[:2] == ("python", "-m"):
        assert importlib.util.find_spec(line.words[2]) is not None
    files = [word for word in line.words[1:] if ("/" in word and "://" not in word) or re.search(r"\.(py|yaml|example)$", word)]
    assert [file for file in files if file not in MADE and not (ROOT / file).exists()] == []


def test_a_wrong_line_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("```bash\nbpt-dist plan -c C --wurld 8   # what it takes\n```\nor `bpt-dist tabel runs`\n")
    monkeypatch.setattr(command_lines, "PAGES", [page])
    monkeypatch.setattr(command_lines, "ROOT", tmp_path)
    wrong = command_lines.lines()
    assert [line.words for line in wrong] == [
        ("bpt-dist", "plan", "-c", "configs/quickstart.yaml", "--wurld", "8"), ("bpt-dist", "tabel", "runs")
    ]  # fmt: skip
    for line in wrong:
        with pytest.raises((AssertionError, Exception)):
            test_bpt_dist_understands_its_lines(line)


def test_programs_that_start_ours_are_installed() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of an environment that is activated
    assert all(shutil.which(program, path=path) for program in ("deepspeed", "torchrun", "make"))
