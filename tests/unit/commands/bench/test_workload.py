"""The work that is timed is the stated one, the clock counts what it says, and rounds go back and forth."""

from __future__ import annotations

import pytest
import torch
import transformers

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.target import padded_to
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup, spread
from bpt_dist.commands.bench.workload import bench_shape, make_work, real_work, source_work
from bpt_dist.errors import ConfigError

TINY = T5Shape(transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1))


def test_the_default_is_the_stated_step() -> None:
    work = source_work(TINY, 5)
    assert [source for source, _ in work.lengths] == [28, 40, 48, 62, 190, 256]
    assert all(3 <= target <= 6 for _, target in work.lengths)
    assert (work.num_rows, work.num_tokens, work.num_padded_tokens) == (30, 6120, 10680)
    assert torch.equal(work.texts.source_ids, source_work(TINY, 5).texts.source_ids)
    assert int(work.texts.source_ids[work.texts.source_mask.bool()].max()) < 64


def test_more_texts_repeat_the_lengths_of_their_task() -> None:
    lengths = [source for source, _ in source_work(TINY, 1, num_tasks=7, texts=2).lengths]
    assert lengths == [28, 28, 40, 40, 48, 48, 62, 62, 190, 190, 256, 256, 28, 28]


def test_padding_further_changes_the_padding_only() -> None:
    work = make_work(TINY, 1, [(5, 2), (9, 3)], 4)
    wider = padded_to(work, 12)
    assert wider.texts.source_ids.shape == (2, 12)
    assert wider.lengths == work.lengths
    assert wider.num_padded_tokens == 2 * (4 + 12)
    assert torch.equal(wider.texts.source_ids[:, :9], work.texts.source_ids)


def test_unknown_shapes_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="--shape t5-smal: is not known; choose t5-small, t5-base, t5-large"):
        bench_shape("t5-smal")


def test_real_lengths_come_from_the_data_pack(data_root, monkeypatch) -> None:
    monkeypatch.setenv("BPT_DATA_ROOT", str(data_root))
    shape = T5Shape(transformers.T5Config(vocab_size=32128, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1))
    work = real_work(shape, 2, texts=2)
    sources = [source for source, _ in work.lengths]
    assert len(sources) == 12
    assert max(sources) == 256, "ReCoRD is cut at the cap"
    assert min(sources) < 60
    assert work.texts.row_ids[0].startswith("sst2/")


def test_real_lengths_without_a_pack_name_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BPT_DATA_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match="set BPT_DATA_ROOT"):
        real_work(TINY, 1)


def test_one_thread_is_timed_by_its_own_seconds_and_several_by_the_wall() -> None:
    import time

    sleeping = lambda: time.sleep(0.3)  # noqa: E731
    alone, several = (Clock(torch.device("cpu"), threads).time(sleeping) for threads in (1, 2))
    assert alone.seconds < 0.2 < alone.wall
    assert several.seconds == several.wall > 0.2


def test_rounds_go_back_and_forth_and_stop_at_the_limit() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = alternate(variants, Clock(torch.device("cpu")), 3)
    assert "".join(order) == "abbaab"
    assert [len(each) for each in times.values()] == [3, 3]
    assert len(alternate(variants, Clock(torch.device("cpu")), 50, limit_seconds=0.0)["a"]) == 2


def test_ratios_are_paired_by_round() -> None:
    opponent, ours = ([Timing(seconds, 0, 0) for seconds in values] for values in ((4.0, 9.0, 2.0), (2.0, 3.0, 2.0)))
    assert speedup(opponent, ours) == (2.0, 1.0, 3.0)
    assert str(spread([2.0, 1.0, 3.0])) == "2.00 [1.00..3.00]"
