"""The files of a checkpoint: which of them hold its weights, what is in them, and the hash over exactly those."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from bpt_dist.distributed.hub import REMEDY
from bpt_dist.errors import ConfigError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}")
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors calls them
PLACES = (".", "/", "~")  # how a path begins that is no hub id
SHOWN = 3  # names in a message
HASH_BLOCK = 1 << 24  # bytes


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the next where it ends in a colon; the error's kind if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def some_of(names: Collection[str]) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet; `dtype` as safetensors calls it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The tensors of a checkpoint by name, and the files they are in."""

    def __init__(self, files: Collection[Path], tensors: Mapping[str, StoredTensor]) -> None:
        self.files, self.tensors = sorted(files, key=lambda file: file.name), tensors

    @property
    def identity(self) -> str:
        """The SHA-256 over the files, in the order of their names."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(HASH_BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def file_facts(self) -> list[tuple[int, int, int, int]]:
        """Return what tells whether two processes of a host see the same files, unread: device, inode, bytes, time of change."""
        facts = [file.stat() for file in self.files]
        return [(fact.st_dev, fact.st_ino, fact.st_size, fact.st_mtime_ns) for fact in facts]

    def read(self, names: Collection[str], dtype: torch.dtype, *, mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `names`, converted to `dtype`, in memory of their own.

        With `mapped` those of that type stay in the mapped file, whose pages the processes of a host share.
        """
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name in sorted(name for name in names if self.tensors[name].file == file):
                    yield name, opened.get_tensor(name).to(dtype, copy=not mapped)


class Checkpoint:
    """A folder, or a repository of the hub, that holds config.json, weights and a tokenizer."""

    def __init__(self, path: str, revision: str | None = None, *, local_only: bool = False) -> None:
        self.path, self.revision, self.local_only = path, revision, local_only
        self.is_folder = Path(path).is_dir()

    def error(self, text: str) -> ConfigError:
        """Return the error that names this checkpoint, followed by `text`."""
        return ConfigError(f"backbone.path: {self.path} {text}")

    @property
    def may_be_on_hub(self) -> bool:
        """Return whether the path is no folder and may be a hub id."""
        return not self.is_folder and not self.path.startswith(PLACES)

    def cannot_load(self, error: Exception) -> ConfigError:
        """Return the error for a checkpoint of which a file cannot be had or read, with the remedy of where it was looked for."""
        remedy = f"{REMEDY}, or give" if self.may_be_on_hub else "give"
        return ConfigError(
            f"backbone.path: cannot load {self.path!r}: {first_line(error)}; {remedy} a folder with {CONFIG}, {SINGLE} and "
            "tokenizer files"
        )

    def file(self, name: str, *, required: bool = False) -> Path | None:
        """Return where a file of the checkpoint is, from the local cache or the hub if need be; None if it has no such file.

        Raises OSError for a required file that cannot be had, and where the hub breaks off.
        """
        if self.is_folder:
            file = Path(self.path) / name
            return file if file.is_file() else None
        try:
            given: Any = cached_file(
                self.path,
                name,
                revision=self.revision,
                local_files_only=self.local_only,
                _raise_exceptions_for_missing_entries=required,
            )
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the transport below the hub's client, whichever library that is
            raise OSError(f"the hub broke off ({first_line(error)})") from error
        return Path(given) if given else None

    def read_json(self, file: Path) -> dict[str, Any]:
        """Return the object in a JSON file of this checkpoint; raises ConfigError when there is none."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(f"has a {file.name} that cannot be read ({first_line(error)}); copy or save it again") from error
        if not isinstance(content, dict):
            raise self.error(f"has a {file.name} with {type(content).__name__} in it, not an object; copy or save it again")
        return content

    def config(self) -> dict[str, Any]:
        """Return config.json. Raises ConfigError where something beside it would change the model without a trace in the hash."""
        file = self.file(CONFIG, required=True)
        if file is None:
            raise self.error(f"has no {CONFIG}; give a folder made by `save_pretrained` or a hub id")
        if not self.is_folder and COMMIT.fullmatch(file.parent.name):
            self.revision = file.parent.name  # all files from one commit, also if the branch moves meanwhile
        content = self.read_json(file)
        if self.file(ADAPTER) is not None:
            raise self.error(
                f"has an adapter beside the weights ({ADAPTER}), which other programs load with them; "
                "move the adapter to a folder of its own, or merge it (`merge_and_unload`) and save the whole model"
            )
        named = content.get("transformers_weights")
        if named not in (None, SINGLE, INDEX):
            raise self.error(f"names other weights in {CONFIG} (transformers_weights: {named}); save the model again as {SINGLE}")
        return content

    def weights(self) -> Weights:
        """Return the one set of weights there is. Raises ConfigError for none, for two, and for files that cannot be read."""
        single, index = self.file(SINGLE), self.file(INDEX)
        if index is None:
            return self._single(single)
        locations = self._index(index)
        names = sorted(set(locations.values()))
        files = {name: self.file(name) for name in names}
        absent = [name for name, file in files.items() if file is None]
        if single is not None and SINGLE not in files:
            state = f"with its shards; remove {SINGLE}, or index and shards, whichever is out of date"
            if absent:
                state = f"of an earlier save, whose shards are not there ({some_of(absent)}); remove the index"
            raise self.error(f"has two sets of weights: {SINGLE}, and {INDEX} {state}")
        if absent:
            raise self.error(f"lacks weight files that {INDEX} names ({some_of(absent)}); copy or download them again")
        self._refuse_strays(set(names))
        weights = self._open([file for file in files.values() if file is not None])
        where = {name: stored.file.name for name, stored in weights.tensors.items()}
        wrong = [name for name in locations.keys() | where.keys() if locations.get(name) != where.get(name)]
        if wrong:
            raise self.error(
                f"has a file {INDEX} that does not fit its shards ({some_of(wrong)}); they are of two saves; save it again"
            )
        return weights

    def _single(self, single: Path | None) -> Weights:
        if single is None:
            shards = self._shards()
            if shards:
                raise self.error(f"has shards ({some_of(shards)}) but no {INDEX}; copy the index as well")
            others = [file.name for file in Path(self.path).glob("*.safetensors")] if self.is_folder else []
            instead = f" (but {some_of(others)})" if others else "" if self.is_folder else " that this machine can reach"
            remedy = "" if self.is_folder else f"{REMEDY}, or "
            raise self.error(
                f"has no .safetensors weights (pickled weights are never read) called {SINGLE} or listed in {INDEX}{instead}; "
                f"{remedy}convert them with `model.save_pretrained(path)`"
            )
        self._refuse_strays(set())
        return self._open([single])

    def _shards(self) -> set[str]:
        if not self.is_folder:
            return set()
        return {file.name for file in Path(self.path).iterdir() if SHARD.fullmatch(file.name)}

    def _refuse_strays(self, names: set[str]) -> None:
        strays = self._shards() - names
        if strays:
            read = f"those {INDEX} names" if names else SINGLE
            raise self.error(f"has two sets of weights, {read} and {some_of(strays)}; remove the one that is out of date")

    def _index(self, file: Path) -> dict[str, str]:
        locations: Any = self.read_json(file).get("weight_map")
        names = list(locations.values()) if isinstance(locations, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise self.error(f"has a file {INDEX} without a weight_map from weights to files of this folder; save the model again")
        return dict(locations)

    def _open(self, files: Collection[Path]) -> Weights:
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                        part = opened.get_slice(name)
                        if name in tensors:
                            raise self.error(f"has {name} in both {tensors[name].file.name} and {file.name}; save the model again")
                        tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError, ValueError) as error:
                raise self.error(
                    f"has a {file.name} that cannot be read ({first_line(error)}); copy or download it again"
                ) from error
        return Weights(files, tensors)
