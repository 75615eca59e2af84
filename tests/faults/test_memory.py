"""F22: a rank without memory names itself, the step and the shape of the batch, and no rank waits for it."""

from __future__ import annotations

import pytest
from fault_figures import measured
from hooks import memory
from trials import Trials

from bpt_dist.storage.files import read_json

# Attention over 200 positions takes some MB a pass; the reserve is for Python, which has to say what happened.
METHOD = {"length": 200, "init": "normal"}
RESERVE = 1500000
LARGE = {"source": {"batch_size": 16}, "target": {"batch_size": 32}, "evaluation": {"batch_size": 32}}
CASES = {
    "rank 1 of 2, step 1": (2, 1, "step.before_forward,stage=source,step=1", r"source step 1, \d+ particle(s) x \d+ text(s)"),
    "rank 0 of 2, step 3": (2, 0, "step.before_forward,stage=source,step=3", r"source step 3, "),
    "rank 2 of 3, target": (3, 2, "step.before_forward,stage=target/mood,step=1", r"target/mood step 1, 1 particle(s)"),
    "alone": (1, 0, "step.before_forward,stage=source,step=2", r"source step 2, 2 particle(s) x 32 text(s)"),
    "rank 1 of 2, evaluation": (2, 1, "eval.batch,task=mood,hit=1", "the evaluation of mood, "),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_without_memory_is_named(case: str, trials: Trials) -> None:
    size, rank, point, words = CASES[case]
    with measured("F22", "address-space limit", case) as figures:
        job = trials.job(METHOD, **LARGE)
        ended = job.start(f"{point},rank={rank},memory:{RESERVE}", size, prepare=memory)
        assert ended.codes[rank] == 70, ended.screen
        assert all(code == 69 for other, code in enumerate(ended.codes) if other != rank), ended.codes
        assert f"rank {rank} on " in ended.screen
        assert f"out of memory at {words.split(',')[0].replace(chr(92), '')}" in ended.screen, ended.screen
        assert "out of memory" in read_json(job.directory / "status.json")["reason"]
        if size > 1:
            figures["worst_seconds"] = round(ended.notice, 2)
            assert ended.notice <= 10
        job.finish(size)
        trials.assert_as_undisturbed(job, size, METHOD, **LARGE)
