"""Draw docs/images/architecture.png, the layers of the package: `.venv/bin/python docs/images/architecture.py`.

The layers are those of the table LAYERS in tests/unit/test_architecture.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
INK, FAINT, ICE, SAND = "#22303c", "#6f7d89", "#e3eef7", "#f6ead6"
PURPOSES = {
    "launcher": "entry points for deepspeed, torchrun, srun, Ray",
    "commands": "what a user starts besides training: plan, table, predict, serve, ...",
    "library": "what `import bpt_dist` offers",
    "train": "the story: source stage, target stage, one step",
    "training": "one run, one stage, one step on this rank; sharding",
    "artifacts": "posterior, results, exports, pictures; their readers",
    "methods": "one file a method: BPT and the baselines",
    "data": "rows to tokens to batches",
    "backbones": "frozen models, one interface",
    "tracking": "the run directory in MLflow",
    "config": "a run as one frozen value, from YAML",
    "tasks": "what a task is; the miniature world",
    "storage": "what a run keeps on disk",
    "distributed": "the processes of a job",
    "svgd": "kernels, Stein direction",
    "objective": "losses and priors",
    "errors": "errors and exit codes",
}
WIDTH, PITCH, HEIGHT, LEFT = 11.2, 1.0, 0.78, 0.3


def layers() -> list[list[str]]:
    """Return the names of every layer, lowest first, in the order of the table."""
    tree = ast.parse((ROOT / "tests" / "unit" / "test_architecture.py").read_text())
    table = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS")
    return [[name.value for name in ast.walk(row) if isinstance(name, ast.Constant)] for row in table.elts]


def box(axes, x: float, y: float, width: float, name: str) -> None:
    """Draw a package, or a single file in another color, with its purpose."""
    folder = not (ROOT / "bpt_dist" / f"{name}.py").exists()
    face = ICE if folder else SAND
    axes.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle="round,pad=0.02", fc=face, ec=INK, lw=0.9))
    title = f"{name}/" if folder else f"{name}.py"
    axes.text(x + width / 2, y + HEIGHT * 0.72, title, ha="center", va="center", size=10.5, weight="bold", color=INK)
    axes.text(x + width / 2, y + HEIGHT * 0.3, PURPOSES[name], ha="center", va="center", size=9, color=INK, linespacing=1.0)


def main() -> None:
    """Draw and save the picture."""
    rows = layers()
    figure = Figure(figsize=(11.5, 8), dpi=130, facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, WIDTH + 1.3), ylim=(-0.75, len(rows) * PITCH + 0.1))
    axes.axis("off")
    for number, names in enumerate(rows):
        gap = 0.3
        width = (WIDTH - gap * (len(names) - 1)) / len(names) if len(names) > 1 else WIDTH / 2
        start = LEFT if len(names) > 1 else LEFT + WIDTH / 4
        for place, name in enumerate(names):
            box(axes, start + place * (width + gap), number * PITCH, width, name)
    x, top = LEFT + WIDTH + 0.45, len(rows) * PITCH - 0.2
    axes.add_patch(FancyArrowPatch((x, top), (x, 0), arrowstyle="-|>", mutation_scale=22, lw=2, color=FAINT))
    axes.text(x + 0.3, top / 2, "imports point down", rotation=270, ha="center", va="center", size=11, color=FAINT)
    text = "A package imports only packages of lower rows; those of one row do not know each other. Blue: package. Sand: file."
    axes.text(LEFT, -0.45, text, size=9, color=FAINT)
    FigureCanvasAgg(figure)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
