"""The options of a method, read from its source: `methods/<name>.py` imports torch, its class `Config` does not need it.

A method is one file that holds its options and its tensors. Reading a configuration needs the options alone: to check it, to
print it, to complete it in an editor, to start a launcher. Importing the file would import torch, which takes seconds, on every
rank and in every command. So the file is parsed to a syntax tree, of which the class `Config` and the imports it may use are
executed and nothing else. The alternatives are a second file for the options of each method, which would have to agree with the
first, or a registry; both would make a new method more than one file.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType

from bpt_dist.config.base import MethodConfig
from bpt_dist.errors import ConfigError

METHODS = Path(__file__).parents[1] / "methods"
LIGHT_MODULES = {
    "typing", "pathlib", "math", "re", "pydantic",
    "bpt_dist.config", "bpt_dist.config.base", "bpt_dist.config.prompt_options",
}  # fmt: skip
"""What a `Config` class may use: these imports of the method file are kept, all others are dropped."""


def method_names(folder: Path = METHODS) -> list[str]:
    """Return the names of all methods: the files of `folder` except `base.py` and private ones."""
    return sorted(file.stem for file in folder.glob("*.py") if file.stem != "base" and not file.stem.startswith("_"))


class _OptionsLoader(InspectLoader):
    """Executes the light imports and the class `Config` of one source file, nothing else of it.

    Not a SourceFileLoader: that would store the shortened code as the bytecode of the real module.
    """

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        kept = [node for node in ast.parse(self.text).body if _is_light_import(node) or _is_config_class(node)]
        # The annotations must be evaluated here: the module is never registered, pydantic could not resolve strings.
        return compile(ast.Module(kept, type_ignores=[]), str(self.file), "exec", dont_inherit=True)


def _is_light_import(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module in LIGHT_MODULES
    return isinstance(node, ast.Import) and all(alias.name in LIGHT_MODULES for alias in node.names)


def _is_config_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == "Config"


@lru_cache(maxsize=64)
def method_options(name: str, folder: Path = METHODS) -> type[MethodConfig]:
    """Return the class `Config` of `folder/<name>.py` without importing that file.

    `name` must come from `method_names`. The class has the fields and validators of the real one but is another
    object; `MethodConfig.as_options_of` turns an instance into one of the real class.
    """
    file = folder / f"{name}.py"
    return options_in(file, file.read_text(encoding="utf-8"))


def options_in(file: Path, text: str) -> type[MethodConfig]:
    """Return the class `Config` of the method file `file`, which holds `text`, without importing it.

    Raises ConfigError where there is none, and whatever its class body raises.
    """
    spec = importlib.util.spec_from_loader(f"{__name__}.{file.stem}", _OptionsLoader(file, text))
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: cannot be read as a method")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = getattr(module, "Config", None)
    if not (isinstance(options, type) and issubclass(options, MethodConfig)):
        raise ConfigError(f"{file}: has no class Config(MethodConfig); every method file needs one")
    return options
