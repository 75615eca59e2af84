"""A module of transformers becomes a class of ours as well."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def mix_in(mixin: type[nn.Module], *modules: nn.Module) -> None:
    """Let modules be a `mixin` as well, whose methods come first.

    Their class is changed rather than a function of theirs, so that copies run their own weights.
    """
    for module in modules:
        if not isinstance(module, mixin):
            of_both: Any = _mixed
            module.__class__ = of_both(mixin, type(module))


@functools.cache
def _mixed(mixin: type[nn.Module], kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
