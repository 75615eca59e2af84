"""F24: an export that another process reads is the old one or the new one, never half of it; also when the writer is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import torch
from fault_figures import record_figure
from hooks import CrashAtCall
from safetensors.torch import load
from server import ForkServer
from trials import Trials

from bpt_dist.artifacts.model_card import CardFacts
from bpt_dist.artifacts.peft_export import WEIGHTS, export_prompt

FACTS = {"d_model": 8, "num_layers": 2, "num_heads": 2}
COMPLETE = {"README.md", "adapter_config.json", WEIGHTS}


def export(value: float, folder: Path) -> None:
    """Export a prompt of equal numbers."""
    card = CardFacts(
        title="t", method="m", backbone_hash="a", tokenizer_hash="b", protocol="fixed", target_tasks=["mood"], results=[]
    )
    export_prompt(torch.full((3, 8), value), folder, base_model="t5", revision=None, config_facts=FACTS, card=card)


def value_of(folder: Path) -> float | None:
    """The number an export holds after proving that it is whole; None if there is no export."""
    if not folder.is_dir():
        return None
    assert {path.name for path in folder.iterdir()} == COMPLETE
    json.loads((folder / "adapter_config.json").read_text())
    prompt = load((folder / WEIGHTS).read_bytes())["prompt_embeddings"]  # a folder moved away is a FileNotFoundError
    assert (prompt == prompt[0, 0]).all()
    return float(prompt[0, 0])


def crashed_export(folder: Path, number: int, before: bool) -> bool:
    """Export 2.0, over 1.0 if there is one `before`, and crash at the n-th file call; return whether it crashed."""
    place = folder / "adapter"
    if before:
        export(1.0, place)
    pid = os.fork()
    if pid == 0:
        try:
            CrashAtCall(folder, number)(0)
            export(2.0, place)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 99


def all_crashes(root: Path) -> tuple[int, list[str]]:
    """Crash at every call, with and without an earlier export; return how many and what was wrong."""
    crashes, wrong = 0, []
    for before in (False, True):
        number = 0
        while True:
            number += 1
            folder = root / f"{before}-{number}"
            folder.mkdir()
            crashed = crashed_export(folder, number, before)
            found = value_of(folder / "adapter")
            # Between the two renames of a replacement there is nothing: a folder cannot replace a folder.
            if found not in (1.0, 2.0, None):
                wrong.append(f"call {number}: {found}")
            export(3.0, folder / "adapter")
            if value_of(folder / "adapter") != 3.0 or list(folder.glob("*.tmp-*")):
                wrong.append(f"call {number}: not repaired by the next export")
            if not crashed:
                break
            crashes += 1
    return crashes, wrong


def test_a_crash_at_every_file_call(server: ForkServer, tmp_path: Path) -> None:
    crashes, wrong = server.call(all_crashes, tmp_path, seconds=200)
    record_figure("F24", "export killed at every file call", trials=crashes, passed=crashes - len(wrong))
    assert wrong == []
    assert crashes >= 20


def read_in_a_loop(folder: Path, done, results) -> None:  # type: ignore[no-untyped-def]
    seen = set()
    reads = 0
    while not done.is_set():
        try:
            seen.add(value_of(folder))
            reads += 1
        except FileNotFoundError:
            continue  # the folder was replaced between two of our calls: the next look sees the new one
        except AssertionError:
            time.sleep(0)
            if folder.is_dir() and {path.name for path in folder.iterdir()} not in (COMPLETE, set()):
                results.put(("half", reads))
                return
    results.put((sorted(value for value in seen if value is not None), reads))


def export_many(folder: Path, number: int) -> tuple[object, int]:
    """Export again and again while another process reads."""
    context = multiprocessing.get_context("fork")
    export(0.0, folder)
    done, results = context.Event(), context.Queue()
    reader = context.Process(target=read_in_a_loop, args=(folder, done, results))
    reader.start()
    for value in range(1, number + 1):
        export(float(value), folder)
    done.set()
    found = results.get(timeout=30)
    reader.join()
    return found


def test_another_process_reads_old_or_new(server: ForkServer, tmp_path: Path) -> None:
    seen, reads = server.call(export_many, tmp_path / "adapter", 40, seconds=200)
    record_figure("F24", "export read by another process", trials=reads, passed=reads if seen != "half" else 0)
    assert seen != "half"
    assert len(seen) > 3  # type: ignore[arg-type]


def test_a_run_killed_in_its_export_exports_again(trials: Trials) -> None:
    job = trials.job()
    ended = job.start(prepare=CrashAtCall(job.directory / "target" / "mood", 12))
    assert ended.codes == [99]
    job.finish()
    trials.assert_as_undisturbed(job)
