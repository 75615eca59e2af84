"""`bpt-dist`: everything beside training. Commands only; their work is in the modules beside this one, imported on use."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bpt_dist.commands.bench.command import bench
from bpt_dist.commands.check.hostfile import DEFAULT_PORT
from bpt_dist.commands.train import main as train_program
from bpt_dist.distributed import environment
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, UserError

app = typer.Typer(
    name="bpt-dist",
    help="Train, look at, plan, check and pass on soft prompts of frozen language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
example = typer.Typer(help="Small computations with a known answer.", no_args_is_help=True)
ConfigFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="A YAML file, see configs/.")]
MaybeConfig = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings that replace those of the file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Data instead of text.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
# Which prompts answer: the same for `predict` and `serve`.
Prompts = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[ADAPTER]...", help="An exported prompt, a run, a folder of exports, or an id of the hub."),
]
NamedPrompts = Annotated[
    list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A prompt under a name of your own; may be repeated.")
]
BackbonePlace = Annotated[str | None, typer.Option(metavar="PATH", help="The backbone, if it is not where the exports say.")]
OfEnsemble = Annotated[bool, typer.Option("--ensemble", help="Of a run: the prompts its ensembles average over.")]
BestParticle = Annotated[bool, typer.Option("--best", help="Of a run: the adapted particle that `evaluation.predict: best` chose.")]
PrefixCache = Annotated[
    int | None, typer.Option(min=0, metavar="MIB", help="Memory for prompts that a decoder-only model has read, by default 512.")
]
app.add_typer(example, name="example")
app.add_typer(bench, name="bench")


class Format(StrEnum):
    """How a table is written."""

    markdown = "markdown"
    latex = "latex"
    page = "page"
    csv = "csv"
    json = "json"


class By(StrEnum):
    """What the rows of a table are."""

    method = "method"
    task = "task"


class SchemaOf(StrEnum):
    """Files that have a schema."""

    run = "run"
    sweep = "sweep"
    tasks = "tasks"
    export = "export"


class Split(StrEnum):
    """Rows that can be evaluated."""

    validation = "validation"
    test = "test"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for usage and configuration, or that of the error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:  # it prepares its process and shows its log in its own way
        return train_program(words[1:], program="bpt-dist train")
    # The commands share cores with training; set OMP_NUM_THREADS for more threads.
    environment.prepare_process()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(words, prog_name="bpt-dist")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except BrokenPipeError:  # `bpt-dist table | head`
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except Exception:
        traceback.print_exc()
        return INTERNAL_ERROR
    return 0


def _print_version(asked: bool) -> None:
    if asked:
        from bpt_dist.commands.lists import print_version

        print_version()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print what a bug report needs and stop.")
    ] = False,
) -> None:
    del version


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train as a configuration says: the same program and options as `launcher/train.py`; the same command resumes."""
    raise typer.Exit(train_program(context.args, program="bpt-dist train"))


@app.command()
def configs(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Files or folders to copy.")] = None,
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Copy below this folder; here by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the configurations that come with the package, or copy some of them."""
    from bpt_dist.commands.configs import print_configs

    print_configs(names or [], to, as_json=as_json)


@app.command()
def methods(
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Count the trained numbers on t5-base, smollm2-135m, ... or a folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: name, what is trained, paper."""
    from bpt_dist.commands.lists import print_methods

    print_methods(shape, as_json=as_json)


@app.command()
def tasks(config: MaybeConfig = None, as_json: AsJson = False) -> None:
    """List the tasks of the catalogue and the miniature world, and with --config those of its task files."""
    from bpt_dist.commands.lists import print_tasks

    print_tasks(config, as_json=as_json)


@app.command()
def schema(
    file: Annotated[Path | None, typer.Argument(help="Written to the screen if left out.")] = None,
    of: Annotated[SchemaOf, typer.Option(help="Runs and tables, sweeps, your tasks, or exports.")] = SchemaOf.run,
) -> None:
    """Write a JSON schema, by which editors complete and check files."""
    from bpt_dist.artifacts.task_record import record_schema
    from bpt_dist.commands.sweep.schema import sweep_schema
    from bpt_dist.config.schema import json_schema, text_of
    from bpt_dist.storage.files import write_atomic
    from bpt_dist.tasks.schema import tasks_schema

    schemas = {
        SchemaOf.run: json_schema, SchemaOf.sweep: sweep_schema, SchemaOf.tasks: tasks_schema, SchemaOf.export: record_schema
    }  # fmt: skip
    text = text_of(schemas[of]())
    if file is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(write_atomic(file, text.encode()))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option("--world", "--ranks", min=1, help="Processes of the job.")] = 1,
    here: Annotated[int | None, typer.Option(min=1, help="Processes on a machine; by default one a GPU, or all.")] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h200, h100, a100, l4, ...: plan for that device; cpu: this machine without its GPUs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a job would compute, send, store and take; refuse what cannot fit."""
    from bpt_dist import config as configuration

    settings = configuration.load(config, overrides or [])
    from bpt_dist.commands.plan.estimate import plans
    from bpt_dist.commands.plan.text import plans_text

    estimates = plans(settings, world, here, device)
    if as_json:
        typer.echo(
            json.dumps([{"runs": [run.name for run in runs], **estimate.to_json()} for estimate, runs in estimates], indent=1)
        )
    else:
        typer.echo(plans_text(estimates), nl=False)


@app.command()
def memory(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(metavar="N,...", help="Numbers of processes, started here one after another.")] = "1,2,4",
    shard: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="none, deepspeed, fsdp2; by default the configuration's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each rank holds of the backbone, also after a step; exit code 1 if it is more than its share."""
    from bpt_dist.commands.memory import print_memory

    if not print_memory(config, overrides or [], ranks, shard, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def check(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    hostfile: Annotated[Path | None, typer.Option(metavar="FILE", help="Examine the hosts it lists, and nothing else.")] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of rank 0, with --hostfile.")] = DEFAULT_PORT,
    as_json: AsJson = False,
) -> None:
    """Examine the installation, and with --config all that its job would need; exit code 2 if something fails."""
    if hostfile is not None:
        from bpt_dist.commands.check.hosts import check_hosts

        passed = check_hosts(hostfile, config, overrides or [], master_port, as_json=as_json)
    else:
        from bpt_dist.commands.check.machine import check_all

        passed = check_all(config, overrides or [], as_json=as_json)
    if not passed:
        raise typer.Exit(2)


@app.command()
def table(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUNS]...", help="Run folders or their parents; `runs` by default.")
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="By default a drawn table on a terminal, Markdown elsewhere; page is a LaTeX document."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write; .tex, .csv, .json name the format.")] = None,
    published: Annotated[bool, typer.Option(help="Add the published numbers, set apart.")] = False,
    split: Annotated[Split, typer.Option(help="Rows the scores are from.")] = Split.test,
    by: Annotated[By, typer.Option(help="The rows; tasks as rows fit the terminal, or 80 columns elsewhere.")] = By.method,
    metric: Annotated[
        list[str] | None, typer.Option(help="Show this in the place of the headline metrics, e.g. nll; may be repeated.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW:ROW[@TASK,...]",
            help="Say in sentences whether the first row differs from the second; one row alone is compared with all others. "
            "May be repeated.",
        ),
    ] = None,
    costs: Annotated[bool, typer.Option(help="Show what training took in the place of the scores.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the results table of finished runs."""
    from bpt_dist.commands.table.command import print_table

    chosen = "json" if as_json else None if form is None else form.value
    print_table(
        runs or [Path("runs")], chosen, out, published=published, split=split.value, by=by.value, metrics=metric or [],
        compared=compare or [], costs=costs,
    )  # fmt: skip


@app.command("run-table")
def run_table(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file with rows and seeds, see configs/table/.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; by default one a GPU, or one a core, at most four.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Train each run with so many processes of the deepspeed launcher instead.")
    ] = None,
    choose: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a configuration of each method's best row on validation.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The smaller version that the file describes in its section `quick`.")
    ] = False,
    row: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Train only this row; may be repeated. By default all.")
    ] = None,
) -> None:
    """Train every row and seed that is not finished and write the table; rerun the command to resume."""
    from bpt_dist.commands.table.command import run_table as run

    code = run(config, overrides or [], workers, processes, choose, quick=quick, only=row or [])
    if code:
        raise typer.Exit(code)


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was stopped or killed.")] = False,
    submit: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run it as a job of the Ray cluster there.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --submit: show the job's output until it ends.")] = False,
) -> None:
    """Search sigma, learning rates or any other setting with Ray Tune, see configs/sweep/."""
    from bpt_dist.commands.sweep.run import sweep as run

    code = run(config, overrides or [], resume=resume, submit=submit, follow=follow)
    if code:
        raise typer.Exit(code)


@app.command()
def plot(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="By default the run's own figures/, or with --over RUN.")] = None,
    over: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Draw the scores of all runs below RUN against this setting, e.g. data.shots; a line a row."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="With --over: average this task; may be repeated. By default all.")] = None,
) -> None:
    """Draw the figures of a run from its metrics.jsonl, or the scores of many runs over a setting."""
    if over is not None:
        from bpt_dist.commands.table.curve import print_curve

        print_curve(run, over, out, task or [])
        return
    if task:
        raise ConfigError("--task: has no effect without --over KEY; remove it")
    from bpt_dist.commands.plot import print_figures

    print_figures(run, out)


@app.command()
def export(
    run: RunFolder,
    task: Annotated[str | None, typer.Option(help="One target task; by default all.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="By default the prompts stay in the run, all else goes to RUN/export.")
    ] = None,
    particles: Annotated[bool, typer.Option(help="Export every particle of the source posterior and their mean as well.")] = False,
    posterior: Annotated[
        bool, typer.Option(help="Export the source posterior as well, for `source.posterior` of other runs.")
    ] = False,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Write the exports to this repository of the Hugging Face hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
) -> None:
    """Write what a finished run trained, as PEFT folders where PEFT knows it, and say how to load it."""
    from bpt_dist.commands.export import export_run

    export_run(run, task, out, particles=particles, posterior=posterior, push_to=push_to, private=private)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A GGUF file, a part of one, or an installed package with one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; `backbone.path` of a run.")],
) -> None:
    """Make a backbone from a GGUF file: safetensors, configuration, tokenizer, and where they come from."""
    from bpt_dist.commands.convert.command import convert as run

    run(source, out)


@app.command("eval")
def evaluate(
    prompt: Annotated[Path, typer.Argument(metavar="RUN|PROMPT", help="A run, an exported folder, a .npy or a .safetensors file.")],
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="Task to evaluate on; may be left out for a run with one target task.")] = None,
    split: Annotated[Split, typer.Option(help="Rows to evaluate on.")] = Split.test,
    config: MaybeConfig = None,
    task_id: Annotated[int | None, typer.Option(min=0, help="Which prompt of a multi-task PEFT folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a stored prompt, or what another method stored, with the settings of its run or of --config."""
    from bpt_dist.commands.eval import print_evaluation

    print_evaluation(prompt, overrides or [], task, split.value, config, task_id, as_json=as_json)


@app.command()
def predict(
    prompts: Prompts = None,
    prompt: NamedPrompts = None,
    rows: Annotated[Path | None, typer.Option(metavar="JSONL", help="The rows; by default standard input.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="JSONL", help="The answers; by default standard output.")] = None,
    backbone: BackbonePlace = None,
    ensemble: OfEnsemble = False,
    best: BestParticle = False,
    window: Annotated[int, typer.Option(min=1, help="Rows that are read before the first of them is answered.")] = 512,
    prefix_cache: PrefixCache = None,
) -> None:
    """Answer rows of one or many tasks, each under its own prompt: one JSON object a line in, one a line out, in order."""
    from bpt_dist.commands.predict import predict as run

    options: dict[str, Any] = {"backbone": backbone, "ensemble": ensemble, "best": best, "window": window}
    run(prompts or [], prompt or [], rows, out, **options, prefix_bytes=_mebibytes(prefix_cache))


@app.command()
def serve(
    prompts: Prompts = None,
    prompt: NamedPrompts = None,
    host: Annotated[str, typer.Option(help="Address to bind; one that other machines reach needs --token-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Its line must come with every request.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Let clients load exports below this folder, and remove tasks.")
    ] = None,
    backbone: BackbonePlace = None,
    ensemble: OfEnsemble = False,
    best: BestParticle = False,
    wait_ms: Annotated[float, typer.Option(min=0, max=10_000, help="Milliseconds a row waits for others at most.")] = 5.0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that one pass reads, prompts included.")] = 16_384,
    prefix_cache: PrefixCache = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of a request.")] = 256,
    max_characters: Annotated[int, typer.Option(min=1, help="Characters of a row.")] = 20_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Rows that wait at once; more are refused by 429.")] = 4096,
    body_seconds: Annotated[float, typer.Option(min=0.1, help="Time in which the body of a request must come.")] = 10.0,
) -> None:
    """Answer rows over HTTP, each under the prompt of its task, rows of all clients in one batch."""
    from bpt_dist.commands.serve.command import Place
    from bpt_dist.commands.serve.command import serve as run

    place = Place(host=host, port=port, token_file=token_file, adapters=adapters)
    sizes = {"body_bytes": max_body, "rows": max_rows, "characters": max_characters, "waiting_rows": max_waiting,
             "body_seconds": body_seconds}  # fmt: skip
    options: dict[str, Any] = {"backbone": backbone, "ensemble": ensemble, "best": best, "wait_ms": wait_ms, "tokens": tokens}
    run(prompts or [], prompt or [], place, **options, prefix_bytes=_mebibytes(prefix_cache), sizes=sizes)


def _mebibytes(number: int | None) -> int | None:
    return None if number is None else number << 20


@app.command()
def sync(run: RunFolder, as_json: AsJson = False) -> None:
    """Send what the tracking store has not got of a run."""
    from bpt_dist.commands.tracking import send_missing

    send_missing(run, as_json=as_json)


@app.command()
def ui(
    uri: Annotated[str | None, typer.Option(help="MLflow store; by default MLFLOW_TRACKING_URI, or the one in --runs.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default a free one.")] = None,
    runs: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that holds the runs; by default runs.")] = None,
) -> None:
    """Start the MLflow page on this machine and print links that open on the comparison."""
    from bpt_dist.commands.tracking import serve_page

    serve_page(uri, port, runs)


@example.command("gaussian-product")
def gaussian_product(
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture.")] = Path("gaussian-product.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the particles' start.")] = 0,
) -> None:
    """Show where SVGD and averages of task optima end when task posteriors have different covariances."""
    from bpt_dist.commands.example import print_gaussian_product

    print_gaussian_product(out, seed)
