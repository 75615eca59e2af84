"""A tiny T5 as plain data, its config.json and tensors, that a test changes and writes as a checkpoint."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_t5
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass
class StoredT5:
    """What `write` puts into a folder; `shards` maps file names to names of tensors, {} for one file without an index."""

    config: dict[str, Any]
    tensors: Tensors
    tokenizer: Path
    shards: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # written last

    @classmethod
    def make(cls, folder: Path, *, tied: bool = True, **options: Any) -> StoredT5:
        """Return a tiny T5 1.0, or one of version 1.1 with a head of its own."""
        tiny_t5.make(folder, tied=tied, **options)
        return cls(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), folder)

    def copy(self) -> StoredT5:
        """Return a copy to change: tensors are shared, none is changed in place."""
        return StoredT5(deepcopy(self.config), dict(self.tensors), self.tokenizer, deepcopy(self.shards), dict(self.files))

    def split(self, num_shards: int) -> None:
        """Store the tensors in shards."""
        names = sorted(self.tensors)
        self.shards = {
            f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors": names[number::num_shards] for number in range(num_shards)
        }

    def write(self, folder: Path) -> Path:
        """Write the checkpoint and return the folder."""
        folder.mkdir(parents=True)
        for file in self.tokenizer.glob("tokenizer*"):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        if not self.shards:
            save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
        else:
            locations = {name: file for file, names in self.shards.items() for name in names}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": locations}))
            for file, names in self.shards.items():
                save_file({name: self.tensors[name] for name in names if name in self.tensors}, folder / file, {"format": "pt"})
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder
