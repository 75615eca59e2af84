"""Data are prepared once a host: rank 0 first, then one rank of every other host; all the others read the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run

from bpt_dist.data import prepared
from bpt_dist.errors import DataError
from bpt_dist.mesh import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def opened(world: World, folder: Path, out: Path, hosts: tuple[str, ...], least_bytes: int) -> tuple[list[str], dict[str, str]]:
    """Open a run on ranks that seem to be on `hosts`, each with a cache of its own, and return what this rank tokenised."""
    made: list[str] = []
    tokenise = prepared.tokenise

    def counted(spec: Any, *arguments: Any, **options: Any) -> Any:
        made.append(spec.name)
        return tokenise(spec, *arguments, **options)

    prepared.tokenise, prepared.LEAST_BYTES = counted, least_bytes
    object.__setattr__(world, "hosts", hosts)
    own = {"data": {"cache": str(out / hosts[world.rank])}, "target": {"batch_size": world.size}}
    plain = tiny_run.settings(folder, {"name": "bpt"}, output=str(out / "runs"), **own)
    (out / f"settings-{world.rank}").mkdir(parents=True)
    with tiny_run.session(tiny_run.load(out / f"settings-{world.rank}", plain), world) as session:
        return made, session.data_hashes()


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
    assert [made for made, _ in found] == expected
    assert all(hashes == found[0][1] for _, hashes in found)
    assert len(found[0][1]) == len(SPLITS)


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
