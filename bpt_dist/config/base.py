"""What every section shares: a frozen model that refuses unknown keys, and the form of a refusal."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _usable_path(path: Path) -> Path:
    """Expand `~`; refuse what no folder of a user has, and what would end a line of a log or of a list of files."""
    if any(not character.isprintable() for character in str(path)):
        raise ValueError("contains a control character, which paths may not hold")
    try:
        return path.expanduser()
    except RuntimeError as error:  # the user has no home directory
        raise ValueError(f"{path} cannot be expanded ({error}); write the whole path, or set HOME") from error


Folder = Annotated[Path, Field(strict=False), AfterValidator(_usable_path)]
"""A path as written in YAML; relative paths start at the working directory, `~` is the home directory."""

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""Names become folders of the run directory, so they can neither leave it nor hide in it."""

Names = Annotated[tuple[Annotated[str, Field(pattern=NAME)], ...], Field(strict=False)]


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, never changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


Options = TypeVar("Options", bound="MethodConfig")


class MethodConfig(Section):
    """Options of one method; `methods/<name>.py` derives its `Config` from this.

    The class variables tell the rules over several sections what the method does; they are not options.
    """

    HAS_SOURCE_STAGE: ClassVar[bool] = False
    """Trains on the source tasks before it adapts to the targets."""
    HAS_PARTICLES: ClassVar[bool] = False
    """Trains `num_particles` prompts that `predict: ensemble` can average over."""
    TRAINS_BACKBONE: ClassVar[bool] = False
    """Changes the weights of the backbone, so they cannot be partitioned as frozen ones."""
    OWN_TARGET_RATES: ClassVar[bool] = False
    """Names its own learning rates of the target stage, so `target.lr` stays null."""
    RATE_IS_OF_PROMPTS: ClassVar[bool] = False
    """The `lr` of its stages is the rate of soft prompts, so `lr_relative` may give it in units of the word embeddings."""

    name: str

    def as_options_of(self, options: type[Options]) -> Options:
        """Return the same options as an instance of `options`, the class of the imported method file, which knows no `path`."""
        return options.model_validate({name: value for name, value in self if name in options.model_fields})


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError that carries every problem, one a line, each `key: what is wrong; remedy`.

    For use in validators over several keys: `config.load` gives each line its own place in the file.
    """
    lines = list(problems)
    if lines:
        raise ValueError("\n".join(lines))


def without_effect(model: BaseModel, condition: str, *fields: str) -> list[str]:
    """Return a problem for each of `fields` that differs from its default although `condition` makes it idle."""
    problems = []
    for field in fields:
        default: Any = type(model).model_fields[field].get_default(call_default_factory=True)
        value = getattr(model, field)
        if value != default:
            problems.append(f"{field}: has no effect {condition} (got {value!r}); remove it")
    return problems


def given_twice(model: BaseModel, field: str) -> list[str]:
    """Return a problem if `field` is given beside its `<field>_relative`, which says the same in other units."""
    value, relative = getattr(model, field), getattr(model, f"{field}_relative")
    if value is None or relative is None:
        return []
    return [f"{field}: is given beside {field}_relative (got {value} and {relative}); set one of them to null"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
