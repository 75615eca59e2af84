"""A method outside the package: `method: {path: my_method.py}`. Its options are read as those of the package's methods are.

The file is read once, when the configuration is: what is pinned, compared between ranks and imported is this content, whatever
happens to the file later.
"""

from __future__ import annotations

import hashlib
import keyword
import traceback
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import Field, create_model

from bpt_dist.config.base import Folder, MethodConfig
from bpt_dist.config.method_source import LIGHT_MODULES, method_names, method_options, options_in
from bpt_dist.errors import ConfigError

KEY = "path"


class OwnMethod(MethodConfig):
    """What a method outside the package has beside its own options."""

    SOURCE: ClassVar[str] = ""
    """The content of the file when the configuration was read."""

    path: Folder = Field(description="Python file of a method outside the package; its name is the name of the method.")


def name_of(path: str) -> str:
    """Return the name of the method in a file."""
    return Path(path).stem


def digest(method: MethodConfig) -> str | None:
    """Return the SHA-256 of the file of a method outside the package, None for a method of the package."""
    return digest_of_source(type(method).SOURCE) if isinstance(method, OwnMethod) else None


def digest_of_source(source: str) -> str:
    """Return the SHA-256 of the content of a method's file."""
    return hashlib.sha256(source.encode()).hexdigest()


def with_name(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section `method` with the name that its `path` gives, where it has a path and no name."""
    path = section.get(KEY)
    return {"name": name_of(path), **section} if isinstance(path, str) and section.get("name") is None else section


def options_of_section(section: Any, folder: Path) -> type[MethodConfig] | None:
    """Return the options of the method that a section names or whose file it gives, None where it does neither.

    Raises ConfigError for a file that is no method.
    """
    if not isinstance(section, dict):
        return None
    names, name = method_names(folder), section.get("name")
    if section.get(KEY) is not None:
        return own_options(section[KEY], names)
    return method_options(name, folder) if isinstance(name, str) and name in names else None


def own_options(path: Any, shipped: Collection[str]) -> type[OwnMethod]:
    """Return the options of the method in the file `path`, with `path` among them, without importing the file.

    `shipped` are the methods of the package. Raises ConfigError in one line for what is no such file.
    """
    if not isinstance(path, str):
        raise ConfigError(f"should be the path of a Python file (got {path!r})")
    file, name = Path(path).expanduser(), name_of(path)
    if file.suffix != ".py":
        raise ConfigError(f"is no Python file (got {path!r}); give a file NAME.py")
    if not name.isascii() or not name.isidentifier() or name != name.lower() or name.startswith("_") or keyword.iskeyword(name):
        raise ConfigError(
            f"the file is named as its method, with a-z 0-9 _ only, the first a letter (got {file.name!r}); rename the file"
        )
    if name in shipped:
        raise ConfigError(f"{name!r} is a method of the package (got {path!r}); rename the file")
    return _options(file, _content(file))


def _content(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"no such file (got {str(file)!r}); relative paths start at the working directory, {Path.cwd()}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text; store it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); make it readable") from None


@lru_cache(maxsize=64)
def _options(file: Path, source: str) -> type[OwnMethod]:
    try:
        compile(source, str(file), "exec", dont_inherit=True)  # the whole of it: some errors are not found by parsing
        options = options_in(file, source)
    except ConfigError:
        raise ConfigError(f"{file} has no class Config(MethodConfig); every method file needs one") from None
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: is not Python ({error.msg}); correct the file") from None
    except Exception as error:
        allowed = ", ".join(sorted(module for module in LIGHT_MODULES if not module.startswith("bpt_dist.config.")))
        raise ConfigError(
            f"{place_of(error, file)}: class Config cannot be read without the rest of the file ({one_line(error)}); it may use "
            f"{allowed}"
        ) from None
    fields, name = options.model_fields, file.stem
    if KEY in fields:
        raise ConfigError(f"{file}: class Config has an option {KEY}, which is where the file is; give it another name")
    default = fields["name"].default
    if isinstance(default, str) and default != name:
        raise ConfigError(f"{file}: class Config names method {default!r}, and the file is named {name!r}; rename one of them")
    # In this order a `name` of the file's own wins over the plain one of every method.
    made = cast(type[OwnMethod], create_model("Config", __base__=(options, OwnMethod), __doc__=options.__doc__))
    made.SOURCE = source
    return made


def place_of(error: BaseException, file: Path) -> str:
    """Return `file:line` of the last line of the file that an error went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
