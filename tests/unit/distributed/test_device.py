"""Which GPU a rank takes, and which ranks do not fit together."""

from __future__ import annotations

import pytest
import torch

from bpt_dist.distributed.device import RankDevice, check_devices, describe, own_device, unlike
from bpt_dist.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that torch sees GPUs: their number is set by each test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return monkeypatch


def test_without_a_gpu_every_rank_computes_on_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert [own_device(rank) for rank in (0, 3)] == [torch.device("cpu")] * 2
    assert describe(torch.device("cpu")).gpu is None


@pytest.mark.parametrize(("count", "local_rank", "place"), [(1, 0, 0), (1, 3, 0), (4, 3, 3), (2, 1, 1)])
def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees(
    count: int, local_rank: int, place: int, gpus: pytest.MonkeyPatch
) -> None:
    """B8: `--gpus-per-task` and one-GPU containers show each rank one device, whatever its local rank."""
    gpus.setattr(torch.cuda, "device_count", lambda: count)
    assert own_device(local_rank) == torch.device("cuda", place)


def test_too_few_gpus_for_the_ranks_of_a_host_are_refused(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2 on .*, which has 2 GPU\(s\); start as many processes"):
        own_device(2)


def test_two_ranks_on_one_gpu_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="rank 1 and rank 2 have the same GPU of east"):
        check_devices([RankDevice("west", "cuda", "a"), RankDevice("east", "cuda", "a"), RankDevice("east", "cuda", "a")])


def test_parts_of_one_gpu_and_cpus_may_share_a_host() -> None:
    check_devices([RankDevice("east", "cuda", "a MIG-1"), RankDevice("east", "cuda", "a MIG-2")])
    check_devices([RankDevice("east", "cpu", None)] * 3)


@pytest.mark.parametrize(("own", "first", "is_wrong"), [("cpu", "cpu", False), ("cuda", "cuda", False), ("cpu", "cuda", True)])
def test_ranks_of_one_job_compute_on_one_kind_of_device(own: str, first: str, *, is_wrong: bool) -> None:
    problem = unlike(own, 3, f"{first} rank 0 on west")
    assert (problem is not None) == is_wrong
    if problem is not None:
        assert "rank 3 on " in problem
        assert "rank 0 on west on a GPU" in problem
