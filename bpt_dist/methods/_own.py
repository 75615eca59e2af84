"""Import the file of a method outside the package: the content that its configuration was read from, not what is there by now."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType

from bpt_dist.config.own_method import OwnMethod, digest_of_source, one_line, place_of
from bpt_dist.errors import ConfigError

PREFIX = "own_method_"


class _WholeFile(InspectLoader):
    """Executes a source; no bytecode is stored beside the user's file."""

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, str(self.file), "exec", dont_inherit=True)


def imported(config: OwnMethod) -> ModuleType:
    """Return the module of a method outside the package; equal contents are one module.

    Raises ConfigError with the line for whatever its import raises.
    """
    source = type(config).SOURCE
    name = f"{PREFIX}{config.name}_{digest_of_source(source)}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, _WholeFile(config.path, source), origin=str(config.path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up the names of annotations there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(
            f"method.path: {place_of(error, config.path)}: cannot be imported ({one_line(error)}); correct the file"
        ) from error
    return module


def digest_of_module(name: str) -> str | None:
    """Return the SHA-256 of the file behind a module that `imported` made, None for any other module."""
    return name.rpartition("_")[2] if name.startswith(PREFIX) else None
