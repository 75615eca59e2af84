"""The command lines of the documents, with the reader's own words replaced: what a test can parse or run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bpt_dist").rglob("*.md"),
                *(ROOT / "configs").rglob("*.yaml")])  # fmt: skip
PROGRAMS = ("bpt-dist", "python", "deepspeed", "torchrun", "make", "pytest", "sbatch", "kubectl", "cp", "git", "source", "rm")
SHELL = ("bash", "sh", "", "console")  # the languages of blocks that hold command lines
# A word of the reader's own, and what a test takes for it.
OWN = {
    "C": "configs/quickstart.yaml", "CONFIG": "configs/quickstart.yaml", "F": "hostfile.example", "hostfile": "hostfile.example",
    "FOLDER": "data", "N": "2", "W": "2", "RUN": "runs/NAME", "chosen.yaml": "configs/table/mini.yaml",
}  # fmt: skip


class Line(NamedTuple):
    """One command line: where it is written, its environment variables and its words."""

    page: str
    text: str
    variables: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        """Name a test."""
        return f"{self.page}: {self.text}"


def lines() -> list[Line]:
    """Return every command line of all pages, each text once."""
    found: dict[str, Line] = {}
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        texts = [*_of_blocks(page.read_text()), *_of_sentences(page.read_text())]
        if page.suffix == ".yaml":
            texts = [line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#   ")]
        for text in filter(_is_command, texts):
            for variant in _variants(text):
                found.setdefault(variant, _line(name, variant))
    return list(found.values())


def _of_blocks(page: str) -> list[str]:
    texts = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language in SHELL:
            for text in block.replace("\\\n", " ").splitlines():
                texts += re.split(r" && ", text.split("  #")[0].split(" # ")[0])
    texts += [line.split("  #")[0] for line in re.findall(r"^    (?! )(.*)$", page, re.MULTILINE)]
    return [text.strip() for text in texts if text.strip()]


def _of_sentences(page: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose) if " " in text.strip()]


def _is_command(text: str) -> bool:
    words = re.sub(r'^([A-Z_]+="[^"]*" +|[A-Z_]+=\S+ +)*', "", text).split()
    return bool(words) and words[0] in PROGRAMS


def _variants(text: str) -> list[str]:
    """Return a text once for each of `a|b|c`, without the parts in brackets that may be left out and what is cut short by dots."""
    text = re.sub(r"\s*\[[^\]]*[A-Za-z ][^\]]*\](?:\.\.\.)?", "", text) if "=[" not in text else text
    text = re.sub(r"\s*(?:…|\.\.\.)$", "", text)
    choice = re.search(r"\b\w+(?:\|\w+)+\b", text)
    return [text.replace(choice[0], word) for word in choice[0].split("|")] if choice else [text]


def _line(page: str, text: str) -> Line:
    words = shlex.split(re.sub(r"<[^>]*>", "FOLDER", text))
    variables = []
    while re.match(r"[A-Z_]+=", words[0]):
        variables.append(words.pop(0))
    return Line(page, text, tuple(variables), tuple(OWN.get(word, re.sub(r"=FOLDER$", "=data", word)) for word in words))
