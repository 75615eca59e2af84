"""Bayesian Prompt Tuning of frozen language models, from Python.

    import bpt_dist

    run = bpt_dist.train("configs/bpt/mini.yaml", target__steps=100)
    run.results, run.table(), run.posterior, run.predictor("mini_review")

The names below are this package's face; what they need is imported when they are used, torch as late as possible. The page is
`docs/library.md`. What is wrong raises a `UserError`; exit codes are for the commands.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpt_dist.errors import ConfigError, DataError, NonFinite, Stopped, StorageError, UserError
    from bpt_dist.library.prompts import Posterior, Prompt, gaussian_penalty, load_posterior, load_prompt
    from bpt_dist.library.runs import Results, Run, Runs, compare
    from bpt_dist.library.task import Task
    from bpt_dist.library.training import train

    __version__: str

__all__ = [
    "ConfigError",
    "DataError",
    "NonFinite",
    "Posterior",
    "Prompt",
    "Results",
    "Run",
    "Runs",
    "Stopped",
    "StorageError",
    "Task",
    "UserError",
    "__version__",
    "compare",
    "gaussian_penalty",
    "load_posterior",
    "load_prompt",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from bpt_dist.storage.provenance import own_version

        return own_version()
    if name == "train":  # the module, which the class below makes callable
        import bpt_dist.train  # noqa: F401

        return sys.modules["bpt_dist.train"]
    if name not in __all__:
        raise AttributeError(f"module 'bpt_dist' has no attribute {name!r}")
    home: ModuleType
    if name in ("Posterior", "Prompt", "gaussian_penalty", "load_posterior", "load_prompt"):
        import bpt_dist.library.prompts as home
    elif name in ("Results", "Run", "Runs", "compare"):
        import bpt_dist.library.runs as home
    elif name == "Task":
        import bpt_dist.library.task as home
    else:
        import bpt_dist.errors as home
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    """The module `bpt_dist.train`: the story of the training, and, called, the function of the library of the same name."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        from bpt_dist.library.training import train

        return train(*args, **keywords)


class _Package(ModuleType):
    """Lets `bpt_dist.train(...)` work although `bpt_dist/train.py` has the same name, in whatever order they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
