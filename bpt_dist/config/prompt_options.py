"""Options that methods with soft prompts share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from bpt_dist.config.base import Folder, MethodConfig, Section, given_twice, refuse, without_effect


class PromptOptions(MethodConfig):
    """How long the prompt is and where it starts."""

    RATE_IS_OF_PROMPTS: ClassVar[bool] = True

    length: int = Field(100, ge=1, le=2000, description="Prompt positions (P).")
    init: Literal["vocabulary", "normal", "uniform", "text", "file"] = Field(
        "vocabulary", description="Initial prompt; `vocabulary` samples rows of the embedding."
    )
    init_text: str | None = Field(None, min_length=1, description="Text of `init: text`, repeated to the length.")
    init_file: Folder | None = Field(
        None, description="Stored prompt of `init: file`: PEFT folder, `owner/name@revision` of the hub, .npy or .safetensors."
    )
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


class FactoredPromptOptions(PromptOptions):
    """Target learning rates of a prompt F o (sum_r u_r v_r^T): that of F, a prompt, and that of its factors, numbers around 1."""

    OWN_TARGET_RATES: ClassVar[bool] = True

    lr_full: float | None = Field(0.3, gt=0, description="Target learning rate of the full-rank matrix F.")
    lr_full_relative: float | None = Field(
        None, gt=0, description="The same in units of the root mean square of the backbone's word embeddings; or give lr_full."
    )
    lr_low_rank: float = Field(0.4, gt=0, description="Target learning rate of the low-rank factors u and v.")

    @model_validator(mode="before")
    @classmethod
    def _relative_replaces_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("lr_full_relative") is not None and "lr_full" not in data:
            return {**data, "lr_full": None}
        return data

    @model_validator(mode="after")
    def _one_full_rate(self) -> Self:
        problems = given_twice(self, "lr_full")
        if (self.lr_full, self.lr_full_relative) == (None, None):
            problems = ["lr_full: is missing; give lr_full or lr_full_relative"]
        refuse(problems)
        return self


class MedianTimes(Section):
    """A bandwidth in units of what the median rule gives."""

    median_times: float = Field(gt=0, description="Factor on the bandwidth of the median rule, median(d^2) / log(M + 1).")


def _bandwidth_form(value: Any) -> str:
    return "times" if isinstance(value, dict | MedianTimes) else "value"


Bandwidth = Annotated[
    Annotated[Annotated[float, Field(gt=0)] | Literal["median"], Tag("value")] | Annotated[MedianTimes, Tag("times")],
    Discriminator(_bandwidth_form),
]
