"""Whether every text fits into the positions of the backbone, asked before the first pass."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bpt_dist.backbones.base import Backbone
from bpt_dist.config import RunConfig
from bpt_dist.data.columns import lengths_of
from bpt_dist.data.prepare import TaskData
from bpt_dist.errors import ConfigError


def check_positions(tasks: Iterable[TaskData], config: RunConfig, backbone: Backbone) -> None:
    """Raise ConfigError where prompt, text and target of a row need more positions than the backbone has."""
    most = backbone.max_positions
    if most is None:
        return
    num_prompt = getattr(config.method, "length", 0)
    for task in tasks:
        for split, rows in task.splits.items():
            answers = [len(ids) for ids in rows.tokens.label_ids] or [0]
            num_target = max(*answers, int(np.max(lengths_of(rows.tokens.target_ids), initial=0)))
            num_source = int(np.max(lengths_of(rows.tokens.source_ids), initial=0))
            needed = num_prompt + num_source + num_target
            if needed > most:
                room = most - num_prompt - num_target
                shorter = f"set data.max_source_length to {room} or less, or lower method.length"
                raise ConfigError(
                    f"data.max_source_length: a text of task {task.spec.name!r} ({split}) has {num_source} tokens, which with "
                    f"{num_prompt} prompt positions and {num_target} target tokens need {needed} positions; {backbone.name} has "
                    f"{most}; {shorter if room > 0 else 'lower method.length'}"
                )
