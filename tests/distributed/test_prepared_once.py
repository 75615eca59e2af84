"""Data are prepared once a host: rank 0 first, then one rank of every other host; all the others read the cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ranks
import tiny_run
from tiny_run import Reached

from bpt_dist.data import mapped_arrays, prepare, token_cache
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


class Done(NamedTuple):
    """What one rank did: the tasks it tokenised and whose rows it hashed, and the cache files it read through."""

    made: list[str]
    looked: list[str]
    verified: list[str]
    hashes: dict[str, str]


def opened(world: World, folder: Path, out: Path, hosts: tuple[str, ...], least_bytes: int, times: int = 1) -> Done:
    """Open a run `times` on ranks that seem to be on `hosts`, each with a cache of its own; return what the last opening did."""
    made: list[str] = []
    looked: list[str] = []
    verified: list[str] = []
    tokenise, origin_of, verify = prepare.tokenise, prepare.rows.origin_of, mapped_arrays._verify

    def counted(spec: Any, *arguments: Any, **options: Any) -> Any:
        made.append(spec.name)
        return tokenise(spec, *arguments, **options)

    def looking(spec: Any, *arguments: Any) -> Any:
        looked.append(spec.name)
        return origin_of(spec, *arguments)

    def verifying(name: str, *arguments: Any) -> None:
        verified.append(name.partition("-")[0])
        verify(name, *arguments)

    prepare.tokenise, prepare.LEAST_BYTES, mapped_arrays._verify = counted, least_bytes, verifying
    prepare.rows.origin_of = looking
    object.__setattr__(world, "hosts", hosts)
    own = {"data": {"cache": str(out / hosts[world.rank])}, "target": {"batch_size": world.size}}
    plain = tiny_run.settings(folder, {"name": "bpt"}, output=str(out / "runs"), **own)
    (out / f"settings-{world.rank}").mkdir(parents=True)
    for _ in range(times):
        for counts in (made, looked, verified):
            counts.clear()
        token_cache._held.clear()
        with suppress(Reached), tiny_run.session(tiny_run.load(out / f"settings-{world.rank}", plain), world) as session:
            hashes = session.data_hashes()
            raise Reached  # so that the run does not count as finished
    return Done(made, looked, verified, hashes)


SPLITS = ["colour", "truth", *["mood"] * 3, *["count"] * 3]  # the train split of two source tasks, all splits of two targets


@pytest.mark.parametrize(
    ("hosts", "least_bytes", "expected"),
    [
        (("a", "a"), 1, [SPLITS, []]),
        (("a", "a", "b", "b"), 1, [SPLITS, [], SPLITS, []]),
        (("a", "a"), 1 << 60, [SPLITS, SPLITS]),
    ],
    ids=["one host", "two hosts", "too small to be kept"],
)
def test_one_rank_of_each_host_tokenises(
    hosts: tuple[str, ...], least_bytes: int, expected: list[list[str]], folder: Path, tmp_path: Path
) -> None:
    found = ranks.run(opened, len(hosts), folder, tmp_path, hosts, least_bytes)
    assert [one.made for one in found] == expected
    assert all(one.hashes == found[0].hashes for one in found)
    assert len(found[0].hashes) == len(SPLITS)


def test_one_rank_of_each_host_looks_at_rows_and_through_the_cache(folder: Path, tmp_path: Path) -> None:
    first, other, second, another = ranks.run(opened, 4, folder, tmp_path, ("a", "a", "b", "b"), 1, 2)
    for one in (first, second):
        assert (one.made, one.verified) == ([], SPLITS)
        assert set(one.looked) == set(SPLITS)
    for one in (other, another):
        assert (one.made, one.looked, one.verified) == ([], [], [])
        assert one.hashes == first.hashes


def refused(world: World, folder: Path, out: Path) -> str:
    with pytest.raises(DataError) as error:
        opened(world, folder, out, ("a", "b"), 1)
    return str(error.value)


def test_a_bad_row_is_refused_on_every_rank_in_the_same_words(tmp_path: Path) -> None:
    folder = tiny_run.world(tmp_path / "world")
    file = folder / "tasks" / "mood" / "train.jsonl"
    file.write_text(file.read_text().replace('"label": 1', '"label": 7', 1))
    first, second = ranks.run(refused, 2, folder, tmp_path / "out")
    assert "train.jsonl:2: field 'label' is 7" in first
    assert second == first
