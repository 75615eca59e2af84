"""Small folders of finished runs, and the table made from them."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_run

from bpt_dist import config as configuration
from bpt_dist.artifacts.results import collect
from bpt_dist.commands.table.table import Table
from bpt_dist.config import RunConfig


def entry(**changes):
    facts = {
        "method": "bpt", "backbone": "mini", "task": "rte", "split": "test", "n": 100, "metric": "accuracy",
        "value": 80.0, "seed": 0, "steps": 50, "trainable_parameters": 640, "joint": False, "stage": "target/rte",
        "run": "", "predict": "map", "decode": "rank", "protocol": "fixed", "headline": True, "majority": 50.0,
    }  # fmt: skip
    facts = {**facts, **changes}
    facts["run"] = facts["run"] or f"{facts['method']}-s{facts['seed']}"
    return facts


def write_run(root: Path, entries: list[dict], status: str = "finished", answers: dict[str, list[int]] | None = None):
    folder = root / entries[0]["run"]
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": status}))
    (folder / "results.json").write_text(json.dumps(entries))
    for task, rights in (answers or {}).items():
        (folder / "target" / task).mkdir(parents=True)
        lines = [json.dumps({"row_id": f"{task}:{i}", "correct": bool(right)}) for i, right in enumerate(rights)]
        (folder / "target" / task / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def build(root: Path, **options) -> Table:
    found = collect([root])
    return Table.build(found.results, notes=found.notes, **options)


def grid(table: Table) -> dict[str, dict[str, str]]:
    """Return label -> column -> printed cell, bold marked by **."""
    sheet = table.sheets()[0]
    rows = [row for block in sheet.blocks for row in block.rows]
    texts = [[f"**{c.text}**" if c.bold else c.text for c in row] for row in rows]
    return {row[0]: dict(zip(sheet.header, row, strict=True)) for row in texts}


def runs_of(tmp_path: Path, *rows: dict, seeds: tuple[int, ...] = (0, 1, 2)) -> list[RunConfig]:
    tiny_run.write_tasks(tmp_path / "tasks")
    plain = tiny_run.settings(tmp_path, {"name": "bpt"}, rows=list(rows), seeds=list(seeds))
    return configuration.expand(tiny_run.load(tmp_path, plain))


def finish(run: RunConfig, scores: dict[str, float], predict: str = "map") -> None:
    """Leave what the curve reads of a finished run."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "config.yaml").write_text(configuration.resolved_yaml(run))
    (run.directory / "status.json").write_text(json.dumps({"state": "finished"}))
    file = run.directory / "results.json"
    entries = json.loads(file.read_text()) if file.exists() else []
    entries += [
        entry(method=run.method.name, run=run.name, seed=run.seed, task=task, value=value, predict=predict, stage=f"target/{task}")
        for task, value in scores.items()
    ]
    file.write_text(json.dumps(entries))
