"""`bpt-dist convert`: a GGUF becomes a folder of safetensors, configuration, tokenizer and provenance."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bpt_dist.commands.convert.folder import (
    WEIGHTS,
    join_pieces,
    refuse_full,
    refuse_occupied,
    whole_or_nothing,
    write_weights,
)
from bpt_dist.commands.convert.header import Header, gguf_package, open_gguf
from bpt_dist.commands.convert.settings import model_settings
from bpt_dist.commands.convert.source import Source, locate
from bpt_dist.commands.convert.tensors import Parameter, parameters, refuse_misfit
from bpt_dist.commands.convert.tokenizer import build_tokenizer
from bpt_dist.commands.output import console, size
from bpt_dist.errors import ConfigError
from bpt_dist.storage.files import write_json_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROVENANCE = "provenance.json"
VERSIONS = ("bpt_dist", "gguf", "transformers", "tokenizers", "numpy")
HASH_BLOCK = 1 << 24  # bytes
TENTHS = 10  # lines of progress where there is no terminal


def convert(source: str, out: Path) -> None:
    """Write the folder `out` from the GGUF that `source` means, and say what it is.

    Raises ConfigError for what cannot be converted, before anything is left on disk; StorageError where the disk fails.
    """
    gguf_package()
    out = out.expanduser()
    refuse_occupied(out)
    found = locate(source)
    if found.in_pieces:
        refuse_full(out, found.num_bytes)
    with whole_or_nothing(out) as draft:
        joined = join_pieces(found.files, draft / "joined.gguf") if found.in_pieces else None
        files = (joined,) if joined else found.files
        typer.echo(f"reading {found.name}, {size(found.num_bytes)}")
        header = open_gguf(files, found.name)
        rms, config = _write(header, files[0], draft, out)
        facts = provenance(found, header, config, rms, whole=joined)
        if joined:
            joined.unlink()
        write_json_atomic(draft / PROVENANCE, facts)
    _say_what_it_is(out, facts)


def _write(header: Header, first: Path, draft: Path, out: Path) -> tuple[float, PreTrainedConfig]:
    """Write weights, configuration and tokenizer; return the root mean square of the word embeddings, and the configuration."""
    settings = model_settings(header)
    found = parameters(header, settings)
    config, expected = _model(header, settings)
    refuse_misfit(header, found, expected)
    refuse_full(out, sum(parameter.num_bytes for parameter in found))
    tokenizer = build_tokenizer(header, first, num_rows=config.vocab_size, max_length=config.max_position_embeddings)
    with _progress(len(found)) as done:
        rms = write_weights(found, draft / WEIGHTS, done)
    config.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    return rms, config


def _model(header: Header, settings: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, tuple[int, ...]]]:
    """Return the configuration, and the parameters of its model with their shapes; no memory is taken for them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if settings["num_hidden_layers"] > len(header.tensors):
        raise ConfigError(f"{header.name}: has fewer tensors than blocks; give the whole model")
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (AssertionError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{header.name}: its settings make no model ({reason}); give another file of it") from error
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def provenance(found: Source, header: Header, config: PreTrainedConfig, rms: float, *, whole: Path | None) -> dict[str, Any]:
    """Return where the folder comes from: files with hashes, what they hold, by which versions, under which licence."""
    files = [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)} for file in found.files]
    package = found.package
    return {
        "source": {
            "name": Path(found.name).name,
            "files": files,
            "sha256": sha256(whole) if whole else files[0]["sha256"] if len(files) == 1 else None,
            "package": {"name": package.name, "version": package.version} if package else None,
        },
        "model": {
            "name": header.get("general.name"),
            "gguf_architecture": header.architecture,
            "architecture": next(iter(config.architectures or ()), None),
            "parameters": sum(math.prod(int(size) for size in tensor.shape) for tensor in header.tensors.values()),
            "embedding_rms": round(rms, 6),
        },
        "tensors": header.types,
        "licence": {
            "file": header.get("general.license"),
            "link": header.get("general.license.link"),
            "package": package.licence if package else None,
            "package_files": list(package.licence_files) if package else [],
        },
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _progress(count: int) -> Iterator[Callable[[Parameter], None]]:
    """Give what is called after each tensor: a bar on a terminal, a line after each tenth elsewhere."""
    columns = (TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = sys.stdout.isatty()
    number = 0
    with Progress(*columns, console=console(), transient=True, disable=not shown) as bar:
        task = bar.add_task("tensors", total=count)

        def done(_: Parameter) -> None:
            nonlocal number
            number += 1
            bar.update(task, completed=number)
            if not shown and number * TENTHS // count > (number - 1) * TENTHS // count:
                typer.echo(f"{number} of {count} tensors")

        yield done


def _say_what_it_is(out: Path, facts: dict[str, Any]) -> None:
    model, licence = facts["model"], facts["licence"]
    types = ", ".join(f"{number} {kind}" for kind, number in facts["tensors"].items())
    typer.echo(f"{model['architecture']}, {model['parameters']:,} numbers from tensors of {types}")
    named = licence["file"] or licence["package"]
    where = f"; its package ships {', '.join(licence['package_files'])}" if licence["package_files"] else ""
    typer.echo(f"licence: {named}{where}" if named else "licence: the file names none; look for it where the file comes from")
    typer.echo(f"{out}")
