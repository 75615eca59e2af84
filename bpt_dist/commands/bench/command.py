"""`bpt-dist bench`: the options of its sub-commands, and what they print."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpt_dist.commands.output import print_list, progress
from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from bpt_dist.commands.bench.source_run import Options
    from bpt_dist.commands.bench.timing import Clock

bench = typer.Typer(invoke_without_command=True, no_args_is_help=False)
Shape = Annotated[
    str | None, typer.Option("--shape", metavar="T5", help="t5-small (on a CPU), t5-base (on a GPU), t5-large, or a folder.")
]
Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="Rounds in which every variant runs once.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of a process; with 1, seconds are its CPU time.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Quick = Annotated[bool, typer.Option("--quick", help="t5-small and less of everything: within 3 minutes on 2 cores.")]
QUICK_SECONDS, QUICK_PARTICLES = 75.0, 2


class Family(StrEnum):
    """Which family of backbones is timed."""

    t5 = "t5"
    decoder = "decoder"


class Lengths(StrEnum):
    """Where the lengths of texts come from."""

    stated = "stated"
    real = "real"


Backbone = Annotated[Family, typer.Option("--backbone", help="`decoder`: a decoder-only model of the shape of SmolLM2-135M.")]


def writable(file: Path | None) -> Path | None:
    """Return `file` if it can be written; ConfigError otherwise, before half an hour is spent on measuring."""
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        problem = "is a folder" if file.is_dir() else None if os.access(file.parent, os.W_OK) else "its folder cannot be written"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ConfigError(f"{file}: {problem}; name another file")
    return file


Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", callback=writable, help="Write everything measured here.")]


@dataclass(frozen=True)
class Given:
    """What a comparison on one shape was asked for, and a function for the facts of the machine it runs on."""

    shape: str | None
    quick: bool
    file: Path | None
    repeats: int | None
    clock: Clock
    machine: Callable[[], dict[str, Any]]


def comparison(run: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all comparisons on one shape have; it gets them together, before its own options."""

    def command(
        shape: Shape = None,
        quick: Quick = False,
        file: Json = None,
        repeats: Repeats = None,
        threads: Threads = 1,
        device: Device = "auto",
        **own: Any,
    ) -> None:
        clock, machine = prepare(device, threads)
        run(Given(shape, quick, file, repeats, clock, machine), **own)

    *common, _ = inspect.signature(command, eval_str=True).parameters.values()
    _, *of_run = inspect.signature(run, eval_str=True).parameters.values()
    command.__signature__ = inspect.Signature([*common, *of_run])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*common, *of_run)}
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command


@bench.callback()
def source(
    context: typer.Context,
    shape: Shape = None,
    quick: Quick = False,
    file: Json = None,
    particles: Annotated[int | None, typer.Option(min=1, help="M; 5 by default, 2 with --quick.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="B, texts of each of the six tasks.")] = 1,
    lengths: Annotated[Lengths, typer.Option(help="`real` draws texts from the data pack.")] = Lengths.stated,
    repeats: Repeats = None,
    threads: Threads = 1,
    device: Device = "auto",
    pass_size: Annotated[int | None, typer.Option(min=1, help="Sequences in one of our passes, as in `source.pass_size`.")] = None,
    backbone: Backbone = Family.t5,
    prompts: Annotated[str, typer.Option(metavar="P,...", help="Prompt positions, with --backbone decoder.")] = "100,20",
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16, with --backbone decoder; all the device has by default.")] = None,
) -> None:
    """Time the source step: PEFT in a loop over particles, the stock T5, ours, in fp32 and bf16; exit code 1 if one is wrong."""
    if context.invoked_subcommand is not None:
        sources = [context.get_parameter_source(name) for name in context.params]
        if any(source is not None and source.name == "COMMANDLINE" for source in sources):
            words = f"bpt-dist bench {context.invoked_subcommand}"
            raise ConfigError(f"{words}: an option before the sub-command has no effect; write it after `{words}`")
        return
    if backbone is Family.decoder:
        decoder_step(shape, quick, file, particles, repeats, threads, device, numbers("--prompts", prompts, least=1), dtype)
        return
    from bpt_dist.commands.bench.source_report import HEADER, NUMBERS, correctness_lines, source_json, table_rows
    from bpt_dist.commands.bench.source_run import Options, run_source
    from bpt_dist.commands.bench.workload import bench_shape, real_work, source_work

    clock, machine = prepare(device, threads)
    t5_shape = bench_shape(shape or default_shape(clock, quick))
    num_particles = particles or (QUICK_PARTICLES if quick else 5)
    if lengths is Lengths.real:
        work = real_work(t5_shape, num_particles, texts=texts)
    else:
        work = source_work(t5_shape, num_particles, texts=texts)
    options = Options(repeats or 5, QUICK_SECONDS if quick else None, pass_size)
    if quick:
        options = options._replace(memory=("peft_fp32", "ours_fp32", "ours_bf16"))

    with progress() as tell:
        measured = run_source(t5_shape, work.to(clock.device), clock, options, tell)
        facts = machine()
    name = shape or default_shape(clock, quick)
    report = {"command": "source", "shape": name, "machine": facts, **source_json(measured, t5_shape, work)}
    say([f"{report['shape']}, M = {num_particles}, {len(work.texts)} texts of {sum(s for s, _ in work.lengths)} tokens, "
         f"P = {work.prompts.shape[1]}: {work.num_rows} rows, {work.num_tokens:,} encoder tokens "
         f"({work.num_padded_tokens:,} padded); {report['rounds']} rounds", ""])  # fmt: skip
    say(["relative difference from float64:", *correctness_lines(report), ""])
    say(machine_text(report))
    print_list(HEADER, table_rows(report), right=NUMBERS)
    say(report["notes"])
    save(report, file)
    if measured.wrong:
        raise typer.Exit(1)


def decoder_step(
    shape: str | None, quick: bool, file: Path | None, particles: int | None, repeats: int | None, threads: int, device: str,
    prompts: Sequence[int], dtype: str | None,
) -> None:  # fmt: skip
    """Time the source step, the ranking of label words and a LoRA step on a decoder-only model."""
    clock, machine = prepare(device, threads)
    from bpt_dist.commands.bench.decoder import HEADER, SMOLLM2, decoder_rows, run_decoder, shape_of, wrong_results
    from bpt_dist.commands.bench.machine import check_dtype, has_bf16
    from bpt_dist.commands.bench.source_run import Options

    if dtype is not None:
        check_dtype(dtype, clock.device)
    dtypes = [dtype] if dtype is not None else ["fp32", "bf16"] if has_bf16(clock.device) else ["fp32"]
    name = shape or SMOLLM2
    config = shape_of(name, quick=quick)
    options = Options(repeats or 3, QUICK_SECONDS if quick else None)
    with progress() as tell:
        report = {"command": "decoder", "shape": name, "layers": config.num_hidden_layers}
        report |= run_decoder(config, particles or (QUICK_PARTICLES if quick else 5), prompts, dtypes, clock, options, tell)
        report["machine"] = machine()
    say([f"{name}, {config.num_hidden_layers} layers; relative difference from transformers' modules:"])
    checks = report["correct"].items()
    say([f"{check['difference']:.1e}  {variant}{'' if check['right'] else '  WRONG'}" for variant, check in checks])
    say(["", *machine_text(report)])
    print_list(HEADER, decoder_rows(report), right=(3, 4, 5, 6, 7))
    save(report, file)
    if wrong_results(report):
        raise typer.Exit(1)


@bench.command()
def svgd(
    particles: Annotated[str, typer.Option(metavar="M,...", help="Numbers of particles.")] = "5,10,32,64,256,1024",
    coordinates: Annotated[int, typer.Option(min=1, help="Numbers in one prompt, P·D.")] = 76800,
    file: Json = None,
    repeats: Repeats = None,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Time the SVGD step alone: naive differences, Pyro, BlackJAX (where installed), ours."""
    sizes = numbers("--particles", particles, least=2)
    clock, machine = prepare(device, threads)
    from bpt_dist.commands.bench.svgd import HEADER, run_svgd, svgd_rows

    with progress() as tell:
        report = {"command": "svgd", **run_svgd(sizes, coordinates, clock, repeats or 5, tell)}
        report["machine"] = machine()
    say([f"the SVGD direction of M particles of {coordinates:,} numbers", *machine_text(report)])
    print_list(HEADER, svgd_rows(report), right=(0, 2, 3, 4, 5))
    say(report["notes"])
    save(report, file)


@bench.command()
def scaling(
    shape: Shape = None,
    quick: Quick = False,
    file: Json = None,
    ranks: Annotated[str, typer.Option(metavar="W,...", help="Numbers of processes; the first is compared with.")] = "1,2,4",
    particles: Annotated[int, typer.Option(min=1, help="Particles of a rank in weak scaling.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    repeats: Repeats = None,
) -> None:
    """Time the step on several gloo processes of one thread each, weak and strong."""
    sizes = numbers("--ranks", ranks, least=1)
    clock, machine = prepare("cpu", 1)
    from bpt_dist.commands.bench.machine import check_dtype
    from bpt_dist.commands.bench.parallel.scaling import HEADER, run_scaling, scaling_rows
    from bpt_dist.commands.bench.workload import bench_shape

    check_dtype(dtype, clock.device)
    name = shape or "t5-small"
    with progress() as tell:
        scaled = run_scaling(bench_shape(name, dtype), sizes, dtype, particles, 100, repeats or (2 if quick else 5), tell)
        report = {"command": "scaling", "shape": name, **scaled, "machine": machine()}
    what = f"{name} {dtype}, six texts; wall time of the slowest rank, median of {report['rounds']} alternating rounds"
    say([what, *machine_text(report)])
    print_list(HEADER, scaling_rows(report), right=tuple(range(3, len(HEADER))))
    say(report["notes"])
    save(report, file)


@bench.command()
def exchange(
    ranks: Annotated[str, typer.Option(metavar="W,...", help="Numbers of processes.")] = "2,4",
    particles: Annotated[str, typer.Option(metavar="M,...", help="Numbers of particles.")] = "8,64,256",
    file: Json = None,
    repeats: Repeats = None,
) -> None:
    """Time what several processes do besides the T5: particles gathered, or coordinates partitioned."""
    sizes, counts = numbers("--ranks", ranks, least=2), numbers("--particles", particles, least=2)
    _, machine = prepare("cpu", 1)
    from bpt_dist.commands.bench.parallel.exchange import HEADER, exchange_row, measure

    bad = [(size, count) for size in sizes for count in counts if count % size]
    if bad:
        raise ConfigError(
            f"--particles {bad[0][1]}: {bad[0][0]} processes cannot divide them equally; choose multiples of {bad[0][0]}"
        )
    measured = []
    with progress() as tell:
        for size in sizes:
            for count in counts:
                tell(f"{size} processes, M = {count}")
                measured.append(measure(size, count, rounds=repeats or 5))
        report = {"command": "exchange", "found": measured, "notes": [], "machine": machine()}
    say(["the SVGD phase with its exchange, P·D = 76,800", *machine_text(report)])
    print_list(HEADER, map(exchange_row, measured), right=tuple(range(len(HEADER))))
    finish(report, file, [])


@bench.command()
def sharded(
    shape: Shape = None,
    quick: Quick = False,
    file: Json = None,
    ranks: Annotated[int, typer.Option(metavar="W", min=2, help="Number of processes.")] = 2,
    particles: Annotated[int, typer.Option(min=1, help="M of the source step.")] = 4,
    shards: Annotated[str, typer.Option("--shard", metavar="KIND,...", help="deepspeed, fsdp2.")] = "deepspeed,fsdp2",
    repeats: Repeats = None,
) -> None:
    """Time the step with the T5 whole and partitioned, by the stock modules and by ours; exit code 1 if one is wrong."""
    kinds = shards.split(",")
    if not set(kinds) <= {"deepspeed", "fsdp2"}:
        raise ConfigError(f"--shard {shards}: is no list of deepspeed and fsdp2; write it like deepspeed,fsdp2")
    _, machine = prepare("cpu", 1)
    from bpt_dist.commands.bench.parallel.sharded import HEADER, run_sharded, sharded_rows, wrong_variants
    from bpt_dist.commands.bench.workload import bench_shape

    name, rounds = shape or "t5-small", repeats or (2 if quick else 5)
    with progress() as tell:
        report = {"command": "sharded", "shape": name}
        report |= run_sharded(bench_shape(name), particles, ranks, [kind for kind in kinds], rounds, tell)  # type: ignore[misc]
        report["machine"] = machine()
    what = f"{name}, M = {particles}, six texts, {ranks} gloo processes; the slowest rank, median of {rounds} alternating rounds"
    say([what, *machine_text(report)])
    print_list(HEADER, sharded_rows(report), right=tuple(range(3, len(HEADER))))
    finish(report, file, wrong_variants(report))


@bench.command()
@comparison
def target(given: Given) -> None:
    """Time the adaptation step on eight rows: PEFT padding to 256 or to the longest, ours; exit code 1 if one is wrong."""
    from bpt_dist.commands.bench.target import HEADER, run_target, target_rows, wrong_in

    report = on_shape("target", given, run_target)
    wrong = [f"wrong result: {name}" for name in wrong_in(report)]
    print_rows(given, report, HEADER, target_rows(report), wrong)


@bench.command()
@comparison
def inserted(given: Given) -> None:
    """Time a step of LoRA and of adapters by the stock modules, padded, and by ours; exit code 1 if one is wrong."""
    from bpt_dist.commands.bench.inserted import HEADER, inserted_rows, run_inserted, wrong_steps

    report = on_shape("inserted", given, run_inserted)
    print_rows(given, report, HEADER, inserted_rows(report), wrong_steps(report), right=(3, 4, 5), what="no prompt")


@bench.command()
@comparison
def evaluation(given: Given) -> None:
    """Time the prediction of label words: `generate` of ten tokens, ranking; exit code 1 if ours predicts other words."""
    from bpt_dist.commands.bench.evaluation import HEADER, evaluation_rows, other_predictions, run_evaluation

    report = on_shape("evaluation", given, run_evaluation)
    wrong = [f"ours predicts other words than the stock T5: {name}" for name in other_predictions(report)]
    print_rows(given, report, HEADER, evaluation_rows(report), wrong)


@bench.command()
@comparison
def predict(given: Given, backbone: Backbone = Family.t5) -> None:
    """Time rows of 1, 10 and 100 tasks in one batch against PEFT switching adapters; exit code 1 if the answers differ."""
    from bpt_dist.commands.bench.predict import HEADER, other_answers, predict_rows, run_predict, run_predict_decoder

    run = run_predict_decoder if backbone is Family.decoder else run_predict
    report = on_shape("predict", given, run, backbone)
    print_rows(given, report, HEADER, predict_rows(report), other_answers(report))


@bench.command()
@comparison
def serve(given: Given, backbone: Backbone = Family.t5) -> None:
    """Time a server with rows of 1, 10 and 100 tasks against PEFT switching adapters; exit code 1 if the answers differ."""
    from bpt_dist.commands.bench.predict import other_answers
    from bpt_dist.commands.bench.serving.run import HEADER, run_serve, run_serve_decoder, serve_rows

    run = run_serve_decoder if backbone is Family.decoder else run_serve
    report = on_shape("serve", given, run, backbone)
    print_rows(given, report, HEADER, serve_rows(report), other_answers(report, "the server"), right=(0, 2, 3, 4, 5, 6, 7))


@bench.command()
def passes(
    shape: Shape = None,
    file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", callback=writable, help="Write the tables here.")] = None,
    particles: Annotated[int, typer.Option(min=1, help="M of the source step.")] = 2,
    repeats: Repeats = None,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Time each optimisation against the version without it, and what did not pay."""
    clock, machine = prepare(device, threads, allocator=False)
    from bpt_dist.commands.bench import ablations
    from bpt_dist.commands.bench.workload import bench_shape, source_work
    from bpt_dist.storage.files import write_atomic

    name = shape or "t5-small"
    t5_shape = bench_shape(name)
    with progress() as tell:
        work = source_work(t5_shape, particles).to(clock.device)
        gains = ablations.run_passes(t5_shape, work, clock, repeats or 5, tell)
        report = {"command": "passes", "shape": name, "particles": particles, **gains, "machine": machine()}
    text = ablations.markdown(report)
    what = f"{name}, M = {particles}; gain of each change, median [least..greatest] of {report['repeats']} rounds"
    say([what, *machine_text(report), text])
    if markdown is not None:
        typer.echo(f"written: {write_atomic(markdown, text.encode())}")
    finish(report, file, [])


def on_shape(command: str, given: Given, run: Any, backbone: Family = Family.t5) -> dict[str, Any]:
    """Run a comparison on the chosen shape, of the default family or a decoder-only model, and return its report."""
    from bpt_dist.commands.bench.decoder import SMOLLM2
    from bpt_dist.commands.bench.decoder import shape_of as decoder_shape
    from bpt_dist.commands.bench.workload import bench_shape

    decodes = backbone is Family.decoder
    name = given.shape or (SMOLLM2 if decodes else default_shape(given.clock, given.quick))
    model: Any = decoder_shape(name, quick=given.quick) if decodes else bench_shape(name)
    report: dict[str, Any] = {"command": command, "shape": name}
    if decodes:
        report["layers"] = model.num_hidden_layers
    with progress() as tell:
        return report | run(model, given.clock, options_of(given.repeats, given.quick), 100, tell)


def options_of(repeats: int | None, quick: bool) -> Options:
    """Return the rounds of a comparison of rows under one prompt."""
    from bpt_dist.commands.bench.source_run import Options

    return Options(repeats or 5, QUICK_SECONDS / 2 if quick else None)


def print_rows(
    given: Given,
    report: dict[str, Any],
    header: Sequence[str],
    lines: Sequence[tuple[str, ...]],
    problems: Sequence[str],
    right: Sequence[int] = (3, 4, 5, 6),
    what: str = "one prompt of 100 positions",
) -> None:
    """Print the table of a command that times rows under prompts of one length; columns listed in `right` hold numbers."""
    report["machine"] = given.machine()
    say([f"{report['shape']}, {what}", *machine_text(report)])
    print_list(header, lines, right=right)
    finish(report, given.file, problems)


def finish(report: dict[str, Any], file: Path | None, problems: Sequence[str]) -> None:
    """Print notes and problems, write the report, and fail if there are problems."""
    say([*report["notes"], *problems])
    save(report, file)
    if problems:
        raise typer.Exit(1)


def numbers(option: str, text: str, *, least: int) -> list[int]:
    """Read a list of numbers.

    Raises ConfigError for anything else.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise ConfigError(f"{option} {text}: is not a list of numbers of at least {least}; write it like {least},{2 * least}")
    return [int(word) for word in words]


def default_shape(clock: Clock, quick: bool) -> str:
    """Return the default shape; on a CPU T5-base would take half an hour."""
    return "t5-small" if quick or clock.device.type == "cpu" else "t5-base"


def prepare(device: str, threads: int, *, allocator: bool = True) -> tuple[Clock, Any]:
    """Configure threads and (unless it is measured) the allocator; return the clock and a function for the machine's facts."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    from bpt_dist.commands.bench import machine
    from bpt_dist.commands.bench.timing import Clock

    if threads > (os.cpu_count() or threads):
        raise ConfigError(f"--threads {threads}: this machine has {os.cpu_count()} cores; choose at most that many")
    torch.set_num_threads(1)  # until `Clock.use_threads`: after computing with several threads a process cannot fork
    kept = machine.keep_pages() if allocator else "off, then on"
    clock = Clock(machine.choose_device(device), threads)
    return clock, lambda: machine.facts(clock, kept)


def machine_text(report: dict[str, Any]) -> list[str]:
    """Return the lines about the machine."""
    from bpt_dist.commands.bench.machine import machine_lines

    return [*machine_lines(report["machine"], report.get("matmul_flops_per_second", {})), ""]


def say(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)


def save(report: dict[str, Any], file: Path | None) -> None:
    """Write the report, if a file is named."""
    from bpt_dist.storage.files import write_atomic

    if file is not None:
        typer.echo(f"written: {write_atomic(file, (json.dumps(report, indent=1) + chr(10)).encode())}")
