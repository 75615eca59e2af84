"""Options every method that starts from a soft prompt shares."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bpt_dist.config.base import Folder, MethodConfig, refuse, without_effect


class PromptOptions(MethodConfig):
    """How long the prompt is and where it starts."""

    length: int = Field(100, ge=1, le=2000, description="Prompt positions (P).")
    init: Literal["vocabulary", "normal", "uniform", "text", "file"] = Field(
        "vocabulary", description="Initial prompt; `vocabulary` samples rows of the embedding."
    )
    init_text: str | None = Field(None, min_length=1, description="Text of `init: text`, repeated to the length.")
    init_file: Folder | None = Field(None, description="Stored prompt of `init: file`: PEFT folder, .npy or .safetensors.")
    init_scale: float | None = Field(
        None, gt=0, description="Standard deviation of `normal` (null is 1), half width of `uniform` (null is 0.5)."
    )

    @property
    def prompt_length(self) -> int | None:
        """Return P, or None where a stored prompt decides it."""
        return None if self.init == "file" else self.length

    @model_validator(mode="after")
    def _initial_prompt(self) -> Self:
        needed = {"text": "init_text", "file": "init_file"}
        idle = [field for init, field in needed.items() if init != self.init]
        idle += [] if self.init in ("normal", "uniform") else ["init_scale"]
        idle += ["length"] if self.init == "file" else []
        problems = without_effect(self, f"with init {self.init}", *idle)
        if self.init in needed and getattr(self, needed[self.init]) is None:
            problems.append(f"{needed[self.init]}: is missing, init {self.init} needs it")
        refuse(problems)
        return self
