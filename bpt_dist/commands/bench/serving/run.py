"""Rounds of the same rows spread over 1, 10 and 100 tasks through the server, and PEFT once a round with 100."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Texts
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.evaluation import TIES, label_words, same_predictions
from bpt_dist.commands.bench.predict import NUM_TASKS, QUICK_ROWS, ROWS, Mixture, answer_task_by_task, flop_limit, mixture
from bpt_dist.commands.bench.serving.exports import rows_of, words_of, write_backbone, write_exports
from bpt_dist.commands.bench.serving.server import Load, Server, served
from bpt_dist.commands.bench.sides import DecoderSides, Sides, T5Sides
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, speedup
from bpt_dist.commands.bench.workload import END, SPECIAL

HEADER = ("tasks", "variant", "s", "rows/s", "p50", "p99", "x PEFT", "x one task")
ROWS_OF_REQUEST, CLIENTS = 8, 16
CHECKED = 40  # rows of 1 and of 10 tasks that PEFT answers too; of 100 tasks all


def run_serve(shape: T5Shape, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return times, latencies, memory and ratios, and whether the server and PEFT predict the same label words, on a T5."""
    clock.use_threads()
    return serve_sides(T5Sides(shape, clock, num_prompt, options.seed), clock, options, num_prompt, tell)


def run_serve_decoder(config: Any, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return the same on a decoder-only model, of which the server keeps the prompts it has read."""
    clock.use_threads()
    return serve_sides(DecoderSides(config, clock, num_prompt, options.seed), clock, options, num_prompt, tell)


def serve_sides(sides: Sides, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Time the server and PEFT on the same mixtures."""
    most = max(NUM_TASKS)
    num_rows = ROWS if options.limit_seconds is None else QUICK_ROWS
    mixtures = {
        number: _servable(mixture(sides, number, num_rows, num_prompt, options.seed), sides, options.seed) for number in NUM_TASKS
    }
    limit = flop_limit(sides, mixtures[most])
    with tempfile.TemporaryDirectory(prefix="bpt-dist-bench-") as name:
        place, exports = Path(name) / "backbone", Path(name) / "exports"
        tell("writing the backbone and its prompts")
        write_backbone(sides, place)
        stored = loading.load(str(place))
        for number, mixed in mixtures.items():
            write_exports(stored, mixed, exports, number)
        del stored
        tell("starting the server")
        with served(exports, clock.num_threads, clock.device.type) as server:
            idle_bytes = server.process.memory_info().rss
            loads, peft, theirs = _rounds(sides, mixtures, server, clock, options, tell)
            peak_bytes = server.peak_bytes
    same = {}
    for number, mixed in mixtures.items():
        tell(f"comparing answers: {number} tasks")
        expected = theirs if number == most else answer_task_by_task(sides, _first(mixed, CHECKED))
        same[number] = _same(mixed, loads[number][0].answers, expected)
    times = {number: [_timing(load, clock) for load in found] for number, found in loads.items()}
    rows = {f"ours_{number}": _row(number, num_rows, times, loads[number], peft) for number in NUM_TASKS}
    seconds = statistics.median(one.seconds for one in peft)
    rows[f"peft_{most}"] = {
        "tasks": most, "title": "PEFT, adapter switched for each task", "seconds": seconds, "rows_per_second": num_rows / seconds
    }  # fmt: skip
    notes = [
        f"{num_rows} rows, {min(ROWS_OF_REQUEST, num_rows // most)} of one task in a request, {CLIENTS} clients at a time; "
        f"one server with all {sum(NUM_TASKS)} prompts",
        "s of the server are those of its process, HTTP and tokenising included; PEFT computes alone, from token ids",
        f"what both multiply allows {limit:.2f} x PEFT at most",
        f"memory of the server: {idle_bytes / 1e6:,.0f} MB after loading, {peak_bytes / 1e6:,.0f} MB at most",
    ]
    return {
        "variants": rows, "same_predictions": same, "rows": num_rows, "clients": CLIENTS, "idle_bytes": idle_bytes,
        "peak_bytes": peak_bytes, "rounds": len(peft), "flop_limit": limit, "notes": notes,
    }  # fmt: skip


def serve_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    rows = []
    for row in report["variants"].values():
        latencies = [f"{1000 * row[key]:,.0f} ms" if key in row else "" for key in ("p50", "p99")]
        ratios = [ratio_cell(row[key]) if key in row else "" for key in ("speedup_over_peft", "speed_of_one_task")]
        rows.append(
            (str(row["tasks"]), row["title"], f"{row['seconds']:.3g}", f"{row['rows_per_second']:.1f}", *latencies, *ratios)
        )
    return rows


def _rounds(
    sides: Sides, mixtures: dict[int, Mixture], server: Server, clock: Clock, options: Options, tell: Tell
) -> tuple[dict[int, list[Load]], list[Timing], list[Tensor]]:
    """Return what each mixture took in each round, what PEFT took, and PEFT's answers."""
    requests = {number: _requests(number, rows_of(mixed, number)) for number, mixed in mixtures.items()}
    for number, mixed in mixtures.items():  # warm-up: every prompt once, as it is kept where a backbone keeps what it read
        server.ask([[row] for row in rows_of(mixed, number)[:number]], CLIENTS)
    found: dict[int, list[Load]] = {number: [] for number in mixtures}
    peft: list[Timing] = []
    theirs: list[Tensor] = []
    run = partial(answer_task_by_task, sides, mixtures[max(mixtures)])
    started = time.perf_counter()
    for number in range(options.repeats):
        elapsed = time.perf_counter() - started
        if options.limit_seconds is not None and number > 1 and elapsed * (number + 1) / number > options.limit_seconds:
            break
        for tasks in list(mixtures) if number % 2 == 0 else list(mixtures)[::-1]:
            tell(f"round {number + 1} of {options.repeats}: {tasks} tasks")
            found[tasks].append(server.ask(requests[tasks], CLIENTS))
        tell(f"round {number + 1} of {options.repeats}: PEFT")
        peft.append(clock.time(lambda: theirs.__setitem__(slice(None), run())))
    return found, peft, theirs


def _requests(number: int, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return requests of rows of one task, the tasks in turn."""
    size = max(1, min(ROWS_OF_REQUEST, len(rows) // max(NUM_TASKS)))
    of_task = [rows[k::number] for k in range(number)]
    return [list(own[first : first + size]) for first in range(0, len(of_task[0]), size) for own in of_task]


def _servable(mixed: Mixture, sides: Sides, seed: int) -> Mixture:
    """Return the mixture with label words of which no two of a task are equal, and texts as a tokenizer writes them.

    Random words of one token may be equal. Random texts end with the end token.
    """
    words = list(mixed.words)
    for k in range(len(words)):
        while len(words[k].unique(dim=0)) < len(words[k]):
            seed += len(words)
            words[k] = label_words((words[k] >= 0).sum(1).tolist(), sides.vocabulary, seed + k)
    ids = mixed.texts.source_ids
    if not sides.ends_texts:
        ids = ids.masked_fill(ids == END, SPECIAL)
    return replace(mixed, words=words, texts=Texts(ids, mixed.texts.source_mask))


def _first(mixed: Mixture, num_rows: int) -> Mixture:
    return replace(mixed, texts=mixed.texts.select(list(range(num_rows))), tasks=mixed.tasks[:num_rows])


def _same(mixed: Mixture, answers: Sequence[Sequence[dict[str, Any]]], expected: Sequence[Tensor]) -> bool:
    """Return whether the words of the server are those PEFT finds likeliest; the `id` of an answer is its row."""
    found = {answer["id"]: answer["probabilities"] for some in answers for answer in some}
    for row, scores in enumerate(expected):
        words = [words_of(word) for word in mixed.words[mixed.tasks[row]].tolist()]
        ours = torch.tensor([found[row][word] for word in words]).log()
        if not same_predictions(ours[None], scores[None].cpu(), TIES["fp32"]):
            return False
    return len(found) == len(mixed.tasks)


def _timing(load: Load, clock: Clock) -> Timing:
    """Return the time of the server: its CPU time where a process has one thread, wall time on a GPU and with several."""
    by_cpu = clock.num_threads == 1 and clock.device.type == "cpu"
    return Timing(load.cpu if by_cpu else load.wall, load.cpu, load.wall)


def _row(
    number: int, num_rows: int, times: dict[int, list[Timing]], loads: Sequence[Load], peft: Sequence[Timing]
) -> dict[str, Any]:
    seconds = statistics.median(time.seconds for time in times[number])
    latencies = sorted(one for load in loads for one in load.latencies)
    row: dict[str, Any] = {"tasks": number, "title": "ours: the server", "seconds": seconds, "rows_per_second": num_rows / seconds}
    row |= {"p50": _quantile(latencies, 0.5), "p99": _quantile(latencies, 0.99)}
    row["wall_seconds"] = statistics.median(load.wall for load in loads)
    row["speed_of_one_task"] = speedup(times[min(times)], times[number]).to_json()
    if number == max(times):
        row["speedup_over_peft"] = speedup(peft, times[number]).to_json()
    return row


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
