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
        assert ended.codes == [2, 2], ended.screen
        assert f"port {port} of {socket.gethostname()} is in use; choose another port: --master_port" in ended.screen
        # The listener is silent: rank 1 must not wait for its answer for ever.
        assert f"127.0.0.1:{port}: something other than rank 0 of this job answers there" in ended.screen
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


def test_a_rank_of_another_job_is_refused_and_nothing_of_it_is_mixed_in(trials: Trials) -> None:
    with measured("F21", "a rank of another job on the port"):
        job, other = trials.job(distribution={"startup_timeout": 4}), trials.job(seed=3)
        ended = trials.server.start(Start(job.config, 2, prepare=FromAnotherJob(other.config)))
        assert ended.codes == [69, 2], ended.screen
        assert "belongs to another job; choose another port" in ended.screen
        assert "rank 1 did not appear within 4 s" in ended.screen
        assert not job.directory.exists()
        assert not other.directory.exists()
