"""`bpt-dist bench` as a user calls it, on a T5 so small that every comparison takes a moment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_decoder
import transformers

from bpt_dist.commands.bench import correctness, source_run, target
from bpt_dist.commands.main import main


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, decoder_start_token_id=0, model_type="t5"
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    """What a probe measures is kept in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))


def bench(capsys, tmp_path, *words) -> tuple[int, str, str, dict]:
    file = tmp_path / "bench.json"
    code = main(["bench", *map(str, words), "--json", str(file)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err, json.loads(file.read_text()) if file.exists() else {}


def test_the_source_step_is_compared_with_peft(shape, capsys, tmp_path) -> None:
    code, out, err, report = bench(capsys, tmp_path, "--shape", shape, "--particles", 2, "--repeats", 2)
    assert code == 0, err
    assert set(report["ratio_to_peft_loop"]) == {"fp32", "bf16"}
    assert report["ratio_to_peft_loop"]["fp32"] > 0
    ours, peft = report["variants"]["ours_fp32"], report["variants"]["peft_fp32"]
    assert report["ratio_to_peft_loop"]["fp32"] == pytest.approx(peft["seconds"] / ours["seconds"], rel=0.5)
    assert ours["padding"] == 0
    assert peft["padding"] == pytest.approx(1 - 2448 / 4272)
    assert ours["tokens_per_second"] == pytest.approx(2448 / ours["seconds"])
    assert ours["particle_steps_per_second"] == pytest.approx(2 / ours["seconds"])
    assert 0 < ours["matmul_share"]["median"] < 1
    assert 0 < ours["kernel_share"] < 1
    assert ours["memory_bytes"] > 1e8
    assert report["rounds"] == 2
    assert all(each["right"] for each in report["correct"].values())
    assert set(report["correct"]) >= {"peft_fp32", "padded_fp32", "grouped_fp32", "ours_fp32"}
    # Correctness comes before the first time, and progress is not in the result.
    assert out.index("relative difference") < out.index("matrix products in this run") < out.index("s/step")
    assert "round 1 of 2: peft_fp32" in err
    assert "round 1 of 2" not in out


def test_a_variant_that_is_wrong_has_no_time_and_fails_the_command(shape, capsys, tmp_path, monkeypatch) -> None:
    right = correctness.packed

    def bent(*arguments):
        losses, gradient = right(*arguments)
        return losses, gradient * 1.05

    monkeypatch.setattr(correctness, "packed", bent)
    code, out, _, report = bench(capsys, tmp_path, "--shape", shape, "--particles", 1, "--repeats", 1)
    assert code == 1
    assert "seconds" not in report["variants"]["ours_fp32"]
    assert "seconds" in report["variants"]["peft_fp32"]
    assert report["ratio_to_peft_loop"]["fp32"] is None
    line = next(line for line in out.splitlines() if line.startswith("ours, packed"))
    assert "wrong" in line
    assert "WRONG" in out


def test_without_bf16_instructions_those_rows_are_left_out(shape, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(source_run, "has_bf16", lambda _device: False)
    monkeypatch.setattr(target, "has_bf16", lambda _device: False)
    code, out, _, report = bench(capsys, tmp_path, "--shape", shape, "--particles", 1, "--repeats", 1)
    assert code == 0
    assert report["ratio_to_peft_loop"]["bf16"] is None
    assert not any(name.endswith("bf16") for name in report["variants"])
    assert "no bf16: this device has no instructions for it" in out
    code, out, _, report = bench(capsys, tmp_path, "target", "--shape", shape, "--repeats", 1)
    assert code == 0
    assert "no bf16" in out


def test_the_adaptation_step_is_compared_at_two_paddings(shape, capsys, tmp_path) -> None:
    code, _, err, report = bench(capsys, tmp_path, "target", "--shape", shape, "--repeats", 2)
    assert code == 0, err
    assert set(report["profiles"]) == {"mrpc", "boolq"}
    for profile in report["profiles"].values():
        ours = profile["variants"]["ours_fp32"]
        assert ours["speedup_over_256"]["median"] > 0
        assert ours["speedup_over_longest"]["median"] > 0
        assert all(each["right"] for each in profile["correct"].values())


def test_evaluation_predicts_what_the_stock_t5_predicts(shape, capsys, tmp_path) -> None:
    code, _, err, report = bench(capsys, tmp_path, "evaluation", "--shape", shape, "--repeats", 2)
    assert code == 0, err
    for profile in report["profiles"].values():
        assert all(profile["same_predictions"].values())
        assert profile["variants"]["ours_fp32"]["speedup_over_generate"]["median"] > 0


def test_rows_of_many_tasks_are_answered_as_by_peft(shape, capsys, tmp_path) -> None:
    code, _, err, report = bench(capsys, tmp_path, "predict", "--shape", shape, "--quick", "--repeats", 2)
    assert code == 0, err
    assert report["same_predictions"] == {"1": True, "10": True, "100": True}
    variants = report["variants"]
    assert variants["ours_100"]["speedup_over_peft"]["median"] > 1, "100 small batches against a few"
    assert variants["ours_1"]["speed_of_one_task"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize("command", ["predict", "serve"])
def test_a_decoder_answers_many_tasks_as_peft(command, capsys, tmp_path) -> None:
    folder = tiny_decoder.make(tmp_path / "decoder")
    words = (command, "--backbone", "decoder", "--shape", folder, "--quick", "--repeats", 2)
    code, out, err, report = bench(capsys, tmp_path, *words)
    assert code == 0, err
    assert report["same_predictions"] == {"1": True, "10": True, "100": True}
    assert report["layers"] == 3
    assert report["variants"]["ours_100"]["speedup_over_peft"]["median"] > 1, "100 small batches against a few"
    if command == "predict":
        assert "each prompt read once" in out
    else:
        assert report["flop_limit"] > 5, "a prompt of 100 positions is read by PEFT for every row"


def test_a_server_answers_many_tasks_as_peft(shape, capsys, tmp_path) -> None:
    code, out, err, report = bench(capsys, tmp_path, "serve", "--shape", shape, "--quick", "--repeats", 2)
    assert code == 0, err
    assert report["same_predictions"] == {"1": True, "10": True, "100": True}
    variants = report["variants"]
    assert variants["ours_100"]["speedup_over_peft"]["median"] > 1
    assert variants["ours_1"]["speed_of_one_task"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert 0 < variants["ours_100"]["p50"] <= variants["ours_100"]["p99"] < variants["ours_100"]["wall_seconds"]
    assert report["peak_bytes"] >= report["idle_bytes"] > 1e8
    assert "one server with all 111 prompts" in out
    assert 1 < report["flop_limit"] < 10


def test_steps_of_what_is_inserted_are_compared_with_the_stock_modules(shape, capsys, tmp_path) -> None:
    code, out, err, report = bench(capsys, tmp_path, "inserted", "--shape", shape, "--repeats", 2)
    assert code == 0, err
    for method in report["methods"].values():
        assert all(row["difference"] < 1e-4 for row in method.values())
        assert method["ours, packed"]["padding"] == 0 < method["one padded batch, stock T5"]["padding"]
    assert "adapters" in out


def test_the_svgd_step_alone(capsys, tmp_path) -> None:
    words = ("svgd", "--particles", "2,20", "--coordinates", 1000, "--repeats", 2)
    code, _, err, report = bench(capsys, tmp_path, *words)
    assert code == 0, err
    assert report["sizes"]["20"]["ours"]["error"] < 1e-5
    assert report["sizes"]["20"]["pyro"]["ours_is_faster_by"]["median"] > 0


def test_scaling_over_processes(shape, capsys, tmp_path) -> None:
    code, _, err, report = bench(capsys, tmp_path, "scaling", "--shape", shape, "--ranks", "1,2", "--repeats", 2)
    assert code == 0, err
    weak, sliced, strong = (report["scaling"][kind]["2"] for kind in ("weak", "weak, coordinates", "strong"))
    assert (weak["mesh"], weak["particles"]) == ([2, 1], 2)
    assert (strong["mesh"], strong["particles"]) == ([1, 2], 5)
    for row in (weak, sliced, strong):
        assert row["efficiency"]["median"] > 0
        assert 0 <= row["exchange_and_kernel_share"] < 1
    assert report["scaling"]["weak"]["1"]["efficiency"]["median"] == 1


def test_more_processes_than_cores_are_noted(shape, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    code, out, _, _ = bench(capsys, tmp_path, "scaling", "--shape", shape, "--ranks", "1,2", "--repeats", 1)
    assert code == 0
    assert "2 processes on 1 cores: they share cores" in out


def test_passes_writes_the_table_of_the_documentation(shape, capsys, tmp_path) -> None:
    table = tmp_path / "passes.md"
    code, out, err, report = bench(
        capsys, tmp_path, "passes", "--shape", shape, "--particles", 1, "--repeats", 1, "--markdown", table
    )
    assert code == 0, err
    changes = {row["change"]: row for row in report["rows"]}
    assert changes["weights frozen"]["measured"]["median"] > 1
    assert changes["allocator keeps its pages (own pass, fp32)"]["measured"] is not None
    assert {row["change"] for row in report["rows"] if not row["pays"]} >= {"activation checkpointing"}
    assert table.read_text() in out
    assert all(f"| {change} |" in table.read_text() for change in changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "t5-hug"], "--shape t5-hug: is not known; choose t5-small, t5-base, t5-large"),
        (["--device", "tpu"], "--device tpu: is not known; choose auto, cpu or cuda"),
        (["--threads", "9999"], "--threads 9999: this machine has"),
        (["svgd", "--particles", "1,5"], "--particles 1,5: is not a list of numbers of at least 2"),
        (["scaling", "--ranks", "1,x"], "--ranks 1,x: is not a list of numbers of at least 1"),
        (["scaling", "--dtype", "fp8"], "--dtype fp8: is not known; choose fp32 or bf16"),
        (["--repeats", "2", "svgd"], "bpt-dist bench svgd: an option before the sub-command"),
        (["exchange", "--ranks", "2", "--particles", "5"], "--particles 5: 2 processes cannot divide them equally"),
    ],
)
def test_errors_name_the_option_and_the_remedy(words, message, capsys, tmp_path) -> None:
    code, _, err, report = bench(capsys, tmp_path, *words)
    assert code == 2
    assert message in err
    assert not report


def test_without_peft_the_command_says_what_to_install(shape, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err, _ = bench(capsys, tmp_path, "--shape", shape, "--particles", 1, "--repeats", 1)
    assert code == 2
    assert "pip install peft" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", [("--json", "source"), ("--markdown", "passes")])
def test_a_place_that_cannot_be_written_is_refused_at_once(option: tuple[str, str], tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    name, command = option
    words = ["bench", *([command] if command != "source" else []), name]
    for place in (tmp_path / "file" / "found", tmp_path):
        assert main([*words, str(place)]) == 2
        assert f"{place}: " in capsys.readouterr().err


def test_a_decoder_only_model_is_compared_with_peft(capsys, tmp_path) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path / "qwen3")
    words = ("--backbone", "decoder", "--shape", tmp_path / "qwen3", "--particles", 2, "--repeats", 2, "--prompts", "3")
    code, out, err, report = bench(capsys, tmp_path, *words)
    assert code == 0, err
    assert all(check["right"] for check in report["correct"].values())
    step = {row["variant"]: row for row in report["rows"] if row["work"] == "source step, P = 3" and row["dtype"] == "fp32"}
    texts = [28 + 3, 40 + 6, 48 + 5, 62 + 5, 190 + 5, 256 + 4]
    assert step["PEFT loop"]["tokens"] == 2 * 6 * (3 + 260)
    assert step["text by text, stock"]["tokens"] == 2 * (6 * 3 + sum(texts) - 6)
    assert step["ours, prompt read once"]["tokens"] == 2 * (3 + sum(texts) - 6)
    assert step["ours, prompt read once"]["padding"] == 0
    assert step["PEFT loop"]["padding"] == pytest.approx(1 - (6 * 3 + sum(texts)) / (6 * 263), abs=1e-4)
    ratio = step["PEFT loop"]["seconds"] / step["ours, prompt read once"]["seconds"]
    assert step["ours, prompt read once"]["ratio"]["median"] == pytest.approx(ratio, rel=0.5)
    assert step["ours, prompt read once"]["flop_limit"] > 1
    assert {row["variant"] for row in report["rows"]} > {"ours, ranked as a tree", "PEFT generate, 10 tokens"}
    assert out.index("relative difference") < out.index("FLOP limit")
    inserted = {row["variant"]: row for row in report["rows"] if row["work"] == "LoRA step, rank 8" and row["dtype"] == "fp32"}
    assert inserted["one padded batch, stock"]["tokens"] == 6 * (256 + 6 - 1)
    assert inserted["ours, packed"]["tokens"] == inserted["text by text, stock"]["tokens"] == sum(texts) - 6
    assert inserted["one padded batch, stock"]["ratio"]["median"] == 1
    assert inserted["ours, packed"]["flop_limit"] > 2


def test_a_shape_that_is_no_decoder_only_model_is_refused(shape, capsys, tmp_path) -> None:
    for name, message in ((shape, "is a 't5' model; give one of llama"), ("gpt9", "is not known; choose smollm2-135m")):
        code, _, err, _ = bench(capsys, tmp_path, "--backbone", "decoder", "--shape", name)
        assert code == 2
        assert message in err
