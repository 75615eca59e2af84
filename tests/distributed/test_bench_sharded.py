"""`bpt-dist bench sharded` on a T5 so small that a step takes a moment: right results, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import transformers

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.parallel.sharded import _receive, wrong_variants
from bpt_dist.commands.main import main
from bpt_dist.distributed.mesh import World


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("HOME", str(tmp_path)), ("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, num_heads=4, d_ff=64, num_layers=2, decoder_start_token_id=0, model_type="t5"
    )
    config.save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


def test_variants_agree_and_the_bytes_of_the_partitioned_ones_are_counted(
    shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    code = main(["bench", "sharded", "--shape", str(shape), "--repeats", "1", "--particles", "2", "--json", str(file)])
    assert code == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    rows = {(row["shard"], row["forward"]): row for row in report["variants"] if row["weights"] != "sent"}
    assert set(rows) == {(shard, forward) for shard in ("none", "deepspeed", "fsdp2") for forward in ("stock", "packed")}
    sent = {row["shard"]: row for row in report["variants"] if row["weights"] == "sent"}
    assert sent.keys() == {"deepspeed", "fsdp2"}
    for shard, row in sent.items():
        assert row["received_bytes"] == rows[shard, "packed"]["received_bytes"]
        assert row["gradient_difference"] < 2e-6
        assert row["messages_seconds"] > 0
    for (shard, forward), row in rows.items():
        if forward == "packed":
            assert row["gradient_difference"] < 2e-6
        assert row["cpu_seconds"] > 0
        assert row["to_stock_wall"]["median"] == pytest.approx(rows[shard, "stock"]["wall_seconds"] / row["wall_seconds"], rel=1e-3)
        assert row["peak_bytes"] > 1e8
        assert (row["received_bytes"] > 0) == (row["messages_seconds"] > 0) == (shard != "none")
        assert row["weights"] == ("kept" if shard == "none" else "read")
    # From one other rank half of all weights, forward and backward; ZeRO does not gather again what it will use next.
    weights = T5Shape(transformers.T5Config.from_pretrained(shape)).weight_bytes
    for shard in ("deepspeed", "fsdp2"):
        assert 0.5 * weights < rows[shard, "packed"]["received_bytes"] < 0.9 * weights
    report["variants"][0]["gradient_difference"] = 0.1
    loss = rows["none", "stock"]["loss_difference"]
    assert wrong_variants(report) == [f"wrong result: none stock kept: loss off by {loss:.0e}, gradient by 1e-01"]


def received(world: World) -> float:
    """Ranks read parts of other lengths, and other numbers of them."""
    return _receive([8, 16], [400, 4096, 8] if world.rank else [8000, 4], world)["wall"]


def test_what_is_received_alone_may_differ_between_ranks() -> None:
    assert min(ranks.run(received, 2)) > 0


def test_another_kind_of_sharding_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sharded", "--shard", "zero"]) == 2
    assert "--shard zero: is no list of deepspeed and fsdp2" in capsys.readouterr().err
