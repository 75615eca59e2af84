"""The method of docs/adding_a_method.md as a file outside the package."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
NAME = "residual_prompt"


def snippet() -> str:
    """Return the file that the page shows."""
    (found,) = re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "docs" / "adding_a_method.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(found)


def write(folder: Path, *, exported: bool = True) -> Path:
    """Write the method into `folder`; without `exported` its prompts are no export, so that its tensors are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    file, text = folder / f"{NAME}.py", snippet()
    file.write_text(text if exported else text[: text.index("    def prompts(self)")])
    return file
