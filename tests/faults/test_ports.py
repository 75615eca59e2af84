"""F21: a port that is taken is named; a rank never works for a job it does not belong to."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from fault_figures import measured
from server import Start, free_port
from trials import Trials


@pytest.mark.parametrize("number", range(3))
def test_a_port_in_use_is_named(number: int, trials: Trials) -> None:
    with measured("F21", "port in use on this machine", str(number)) as figures, socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        job = trials.job(distribution={"startup_timeout": 6})
        ended = trials.server.start(Start(job.config, 2, port=port))
        assert ended.codes[0] == 2, ended.screen
        assert f"127.0.0.1:{port}: another program listens on this port; choose another with --master_port" in ended.screen
        assert ended.codes[1] == 69, ended.screen
        assert f"no rank 0 of this job at 127.0.0.1:{port} within 6 s" in ended.screen
        assert not job.directory.exists()
        figures["worst_seconds"] = round(max(ended.seconds), 1)


class FromAnotherJob:
    """Rank 1 was started with another configuration."""

    def __init__(self, config: Path) -> None:
        self.config = config

    def __call__(self, rank: int) -> None:
        import sys

        if rank == 1:
            from bpt_dist import config as configuration

            load = configuration.load
            configuration.load = lambda path, overrides=(): load(self.config, overrides)
            assert "bpt_dist.train" in sys.modules


def test_a_rank_of_another_job_is_refused_by_all(trials: Trials) -> None:
    with measured("F21", "a rank of another job on the port"):
        job, other = trials.job(), trials.job(seed=3)
        ended = trials.server.start(Start(job.config, 2, prepare=FromAnotherJob(other.config)))
        assert ended.codes == [2, 2], ended.screen
        assert "rank 1 on " in ended.screen
        assert "came from another job than rank 0" in ended.screen
        assert not job.directory.exists()
        assert not other.directory.exists()
