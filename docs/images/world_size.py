"""Draw docs/images/world_size.png, how rounding grows in the source stage of the quick start: `python docs/images/world_size.py`.

Trains the BPT source stage of configs/quickstart.yaml on the shipped pretrained backbone several times: in one process, in two
processes, and in one process with smaller passes. It takes some minutes on two cores and needs no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

HERE = Path(__file__).parent
STEPS = 40
INK, FAINT = "#22303c", "#8a97a3"
ONE_GRID_ROW = (
    "distribution.mesh.particle=1",
    "distribution.mesh.data=2",
)  # both processes have all particles and share the texts
# label, colour, line style, processes, overrides; each is compared with one process under the same learning rate
CASES = (
    ("2 processes, lr 0.3", "#0072b2", "-", 2, (*ONE_GRID_ROW,)),
    ("1 process, passes of 3, lr 0.3", "#d55e00", "-", 1, ("source.pass_size=3",)),
    ("2 processes, lr 0.003", "#009e73", "-", 2, (*ONE_GRID_ROW, "source.lr=0.003")),
    ("exact, 2 processes, lr 0.3", "#cc79a7", "--", 2, (*ONE_GRID_ROW, "distribution.exact=true")),
)


def train(folder: Path, overrides: list[str]) -> None:
    """Train the source stage and write the particles at the start of every step (rank 0)."""
    import torch
    from safetensors.torch import save_file

    from bpt_dist import config as configuration
    from bpt_dist.train import train_run
    from bpt_dist.training.run import TrainingRun
    from bpt_dist.training.startup import start_world

    config = configuration.load(folder / "config.yaml", overrides)
    world, particles = start_world(config), []

    class Recording:
        """Records while it is entered."""

        def __init__(self, run: TrainingRun) -> None:
            self.method, self.begin_step = run.method, run.method.begin_step
            self.method.begin_step = self.record  # type: ignore[method-assign]

        def record(self, mesh) -> None:
            particles.append(self.method.particles.detach().clone())
            self.begin_step(mesh)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    train_run(config, world, around=Recording)
    if world.rank == 0:
        save_file({"particles": torch.stack(particles)}, folder / "particles.safetensors")
    world.stop()


def particles_of(folder: Path, num_processes: int, overrides: tuple[str, ...]):
    """Return the particles [steps, M, P, D] of a run in `num_processes` processes."""
    from safetensors.torch import load_file

    from bpt_dist.distributed.environment import free_port

    folder.mkdir()
    plain = yaml.safe_load((HERE.parents[1] / "configs" / "quickstart.yaml").read_text())
    for key in ("rows", "seeds", "comparisons"):
        del plain[key]
    plain |= {"output": str(folder), "figures": False, "tracking": {"mlflow": False}, "target": {"steps": 0}}
    plain["data"]["target_tasks"] = []
    plain["source"] |= {"steps": STEPS, "checkpoint_every": STEPS}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    command, port = [sys.executable, __file__, str(folder), *overrides], str(free_port())
    processes = []
    for rank in range(num_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(place if num_processes > 1 else {})}
        processes.append(subprocess.Popen(command, env=environment))
    if any([process.wait() for process in processes]):
        sys.exit(f"a process of {' '.join(command)} failed; see its message above")
    return load_file(folder / "particles.safetensors")["particles"]


def differences() -> dict[str, list[float]]:
    """Return the relative difference of the particles by step in each case."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        alone: dict[tuple[str, ...], object] = {}
        for number, (label, _, _, num_processes, overrides) in enumerate(CASES):
            reference = tuple(word for word in overrides if word.startswith(("source.lr", "distribution.exact")))
            if reference not in alone:
                alone[reference] = particles_of(Path(temporary) / f"alone-{number}", 1, reference)
            expected = alone[reference].double()
            run = particles_of(Path(temporary) / f"case-{number}", num_processes, overrides).double()
            found[label] = ((run - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).tolist()
            print(label, " ".join(f"{value:.1e}" for value in found[label]), flush=True)
    return found


def draw(curves: dict[str, list[float]], file: Path) -> None:
    """Draw the differences on a logarithmic axis; equal bits are below it and are drawn on its lower edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    floor = 1e-10
    figure = Figure(figsize=(8.5, 4.4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, colour, style, _, _ in CASES:
        values = curves[label]
        text = label if any(values) else f"{label}: equal bits"
        axes.plot(range(len(values)), [max(value, floor) for value in values], style, color=colour, lw=1.8, label=text)
    axes.axhline(1e-5, color=FAINT, lw=0.8, ls=":")
    axes.text(STEPS - 1, 1.25e-5, "1e-5", ha="right", color=FAINT, size=8)
    axes.set_yscale("log")
    axes.set_ylim(floor * 0.7, 10)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("relative difference of the particles", color=INK)
    axes.set_title("The same run, summed in another order", loc="left", color=INK, size=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 0.49))
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), sys.argv[2:])
    else:
        draw(differences(), HERE / "world_size.png")
