"""Draw docs/images/idea.png, the picture of the method in the README: `.venv/bin/python docs/images/idea.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, FAINT, ICE = "#22303c", "#8a97a3", "#e3eef7"
PARTICLES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
TASKS = ("MNLI", "QNLI", "QQP", "SST-2", "SQuAD", "ReCoRD")


def box(axes, x, y, width, height, text, face="white", edge=INK, size=9, weight="normal"):
    """Draw a rounded box with a text in its middle."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=face, ec=edge, lw=1.1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=INK, weight=weight)


def arrow(axes, start, end, color=INK, width=1.3, style="-|>"):
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, lw=width, color=color, shrinkA=0, shrinkB=0))


def inputs(axes):
    """Every particle before the texts of every source task, through one frozen T5."""
    axes.set_title("1  M prompts meet K source tasks", loc="left", size=11, color=INK, weight="bold")
    for row, task in enumerate(TASKS):
        y = 8.6 - row * 1.15
        for index, color in enumerate(PARTICLES):
            axes.add_patch(FancyBboxPatch((0.2 + index * 0.34, y), 0.24, 0.6, boxstyle="round,pad=0.01", fc=color, ec="none"))
        box(axes, 1.8, y, 2.5, 0.6, f"text of {task}", size=8.5)
    box(axes, 5.6, 3.0, 2.2, 5.9, "frozen\nT5", face=ICE, size=13, weight="bold")
    arrow(axes, (4.5, 6.0), (5.5, 6.0))
    arrow(axes, (7.95, 6.0), (9.3, 6.0))
    axes.text(6.7, 2.3, r"score  $s_m=\nabla_{\theta_m}\!\sum_k \log P(D_k\,|\,\theta_m)$", ha="center", size=9.5, color=INK)
    axes.text(6.7, 1.4, "only the prompts move", ha="center", size=9, color=FAINT)


def posterior(axes):
    """Particles climb the posterior and keep apart; their mean is the hand-over."""
    axes.set_title("2  SVGD: samples of the posterior", loc="left", size=11, color=INK, weight="bold")
    x, y = np.meshgrid(np.linspace(0, 10, 200), np.linspace(0, 10, 200))
    density = np.exp(-(((x - 5.2) / 2.6) ** 2 + ((y - 5.4) / 1.7) ** 2 - 0.5 * (x - 5.2) * (y - 5.4) / 4.4))
    axes.contour(x, y, density, levels=6, colors=[FAINT], linewidths=0.8, alpha=0.8)
    starts = np.array([[1.2, 1.6], [1.9, 1.3], [1.3, 2.4], [2.2, 2.0]])
    ends = np.array([[3.4, 4.3], [5.9, 4.2], [4.3, 6.6], [7.0, 6.4]])
    for start, end, color in zip(starts, ends, PARTICLES, strict=True):
        axes.add_patch(Circle(start, 0.13, color=color, alpha=0.35))
        arrow(axes, start, end, color=color)
        axes.add_patch(Circle(end, 0.2, color=color))
    mean = ends.mean(0)
    axes.plot(*mean, marker="*", ms=17, color=INK, mec="white")
    axes.text(mean[0] + 0.4, mean[1] - 0.15, r"$\bar\theta$", size=14, color=INK)
    formula = r"$\phi_i=\frac{1}{M}\sum_j\;k(\theta_j,\theta_i)\,s_j\;+\;\nabla_{\theta_j}k(\theta_j,\theta_i)$"
    axes.text(5.2, 9.3, formula, ha="center", size=10.5, color=INK)
    axes.text(4.2, 0.55, "shared score: climb", size=9, color=FAINT, ha="center")
    axes.text(8.0, 0.55, "repulsion: spread", size=9, color=FAINT, ha="center")


def targets(axes):
    """The mean is start and prior of every target's prompt."""
    axes.set_title(r"3  MAP prompt of each target, prior $N(\bar\theta,\sigma^2 I)$", loc="left", size=11, color=INK, weight="bold")
    mean = np.array([5.0, 5.1])
    for radius, alpha in ((3.6, 0.25), (2.5, 0.4), (1.4, 0.6)):
        axes.add_patch(Circle(mean, radius, fc=ICE, ec=FAINT, lw=0.8, alpha=alpha))
    places = {"RTE": (7.4, 7.3), "CB": (2.7, 7.1), "WiC": (7.2, 2.9), "BoolQ": (2.9, 2.8)}
    for name, place in places.items():
        arrow(axes, mean, place)
        axes.text(place[0], place[1] + (0.25 if place[1] > mean[1] else -0.65), name, ha="center", size=10, color=INK)
    axes.plot(*mean, marker="*", ms=17, color=INK, mec="white")
    formula = r"$\theta=F\circ\sum_r u_r v_r^{\!\top}\qquad J=-\log P(D\,|\,\theta)+\frac{1}{2\sigma^2}\|\theta-\bar\theta\|^2$"
    axes.text(5.0, 0.4, formula, ha="center", size=10.5, color=INK)


def main() -> None:
    """Draw the three panels side by side."""
    figure = Figure(figsize=(14, 4.6), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, 3), (inputs, posterior, targets), strict=True):
        axes.set(xlim=(0, 10), ylim=(0, 10), aspect="auto")
        axes.axis("off")
        draw(axes)
    figure.savefig(Path(__file__).with_name("idea.png"))


if __name__ == "__main__":
    main()
