"""Draw docs/images/distributed_step.png, one step on four ranks: `.venv/bin/python docs/images/distributed_step.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT, ICE, WIRE = "#22303c", "#8a97a3", "#e3eef7", "#f6ead6"
PARTICLES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LANES = (("rank 0  (a=0, c=0)", (0, 1), "0 2 3"), ("rank 1  (a=0, c=1)", (0, 1), "1 4 5"),
         ("rank 2  (a=1, c=0)", (2, 3), "0 2 3"), ("rank 3  (a=1, c=1)", (2, 3), "1 4 5"))  # fmt: skip
TOP, PITCH, HEIGHT = 7.0, 1.75, 1.15


def lane(index: int) -> float:
    """Return the lower edge of a rank's lane."""
    return TOP - index * PITCH


def box(axes, x, y, width, height, text, face="white", size=8.5):
    """Draw a rounded box with a text in its middle."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=face, ec=INK, lw=0.9))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=INK)


def chips(axes, x, y, own):
    """Draw the particles a rank owns."""
    for place, particle in enumerate(own):
        axes.add_patch(
            FancyBboxPatch((x + place * 0.34, y), 0.22, HEIGHT - 0.1, boxstyle="round,pad=0.01", fc=PARTICLES[particle], ec="none")
        )


def wire(axes, x, lanes, text, width=0.55):
    """Draw a collective over some lanes: one bar, whose ends are the ranks that take part."""
    low, high = lane(lanes[-1]), lane(lanes[0]) + HEIGHT
    axes.add_patch(FancyBboxPatch((x, low), width, high - low, boxstyle="round,pad=0.02", fc=WIRE, ec=INK, lw=0.9))
    axes.text(x + width / 2, (low + high) / 2, text, ha="center", va="center", size=8, rotation=90, color=INK)


def main() -> None:
    """Draw and save the picture."""
    figure = Figure(figsize=(12.5, 5.2), dpi=160)
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.94))
    axes.set_xlim(0, 19.6)
    axes.set_ylim(0.55, 9.7)
    axes.axis("off")
    heads = ((0.3, "owns"), (3.5, "1  start\ngather of θ"), (5.3, "2  passes through the frozen T5"), (9.75, "3  sum\nover texts"),
             (11.25, "4  agree"), (12.6, "5  gather\nscores"), (14.5, "6  own rows of φ, own optimizer"))  # fmt: skip
    for x, text in heads:
        axes.text(x, 8.65, text, size=9, weight="bold", color=INK, va="bottom")
    for index, (name, own, texts) in enumerate(LANES):
        y = lane(index)
        axes.text(0.3, y + HEIGHT / 2, name, va="center", size=9, color=INK)
        chips(axes, 2.45, y + 0.05, own)
        box(axes, 5.3, y, 3.9, HEIGHT, f"θ{own[0] + 1}, θ{own[1] + 1}  ×  texts {texts}\nforward and backward", face=ICE)
        rows = f"rows {own[0] + 1}, {own[1] + 1} of  φ = (K s + ∇K) / M\nAdamW on θ{own[0] + 1}, θ{own[1] + 1}"
        box(axes, 14.5, y, 4.9, HEIGHT, rows)
    # Steps 1 and 4 join the ranks with the same texts, step 3 those with the same particles.
    for x, label in ((3.55, "all-gather θ"), (12.65, "all-gather s")):
        wire(axes, x, (0, 2), f"{label}  (0, 2)", 0.42)
        wire(axes, x + 0.62, (1, 3), f"{label}  (1, 3)", 0.42)
    wire(axes, 9.95, (0, 1), "all-reduce ∂θ")
    wire(axes, 9.95, (2, 3), "all-reduce ∂θ")
    wire(axes, 11.4, (0, 3), "flags, losses, seconds: one all-gather over all")
    axes.add_patch(FancyArrowPatch((4.0, 1.2), (13.0, 1.2), arrowstyle="<->", mutation_scale=10, lw=1, color=FAINT))
    axes.text(
        8.5,
        1.28,
        "the gather of θ runs beside the passes; the kernel waits for it",
        ha="center",
        size=8.5,
        color=FAINT,
        va="bottom",
    )
    FigureCanvasAgg(figure)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
