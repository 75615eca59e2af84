"""What the site shows beside the pages of this folder: the README as its first page, and links to files of the repository as text.

mkdocs calls the functions by their names (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
START = "index.md"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page."""
    files.append(File.generated(config, START, content=first_page((ROOT / "README.md").read_text())))
    return files


def first_page(text: str) -> str:
    """Return the README with links that hold from the folder of the pages on."""
    return IMAGE.sub(r"\1", re.sub(r"\]\(docs/", "](", text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to the README at the first page, and write links that leave this folder as text: the site has no such page."""

    def rewritten(match: re.Match[str]) -> str:
        label, target = match.groups()
        if target.startswith(("http:", "https:", "#", "mailto:")):
            return match.group()
        path, _, anchor = target.partition("#")
        if path in ("../README.md", "README.md"):
            return f"[{label}]({START}{'#' + anchor if anchor else ''})"
        inside = (ROOT / "docs" / path).resolve().is_relative_to(ROOT / "docs") and (ROOT / "docs" / path).exists()
        return match.group() if inside else label

    # Code is left alone: what looks like a link there is none.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
