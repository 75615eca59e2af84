"""Learning rates in units of the word embeddings: what they are in numbers, for which tensors, and where they are seen."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
from safetensors.numpy import load_file

from bpt_dist.config.method_source import method_names, method_options
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout

OF_PROMPTS = [name for name in method_names() if method_options(name).RATE_IS_OF_PROMPTS]
# Tensors that are no prompts: their rates are numbers of their own.
OTHERS = {"u": 0.4, "v": 0.4, "position_factor": 5e-3, "down": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"), layers=1)


def rms(world: Path) -> float:
    """The root mean square of the table of the stored T5, in numpy."""
    table = load_file(world / "t5" / "model.safetensors")["shared.weight"].astype(numpy.float64)
    return float(numpy.sqrt(numpy.mean(table**2)))


def plain(world: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A run of `name` whose stages have relative rates of 0.25 and 0.125 and keep them."""
    options, rates = method_options(name), {"lr": None, "schedule": "constant"}
    source = {**rates, "lr_relative": 0.25} if options.HAS_SOURCE_STAGE else {}
    target = {"schedule": "constant"} if options.OWN_TARGET_RATES else {**rates, "lr_relative": 0.125}
    method = {"name": name} | ({"lr_full_relative": 0.125} if options.OWN_TARGET_RATES else {})
    given = tiny_run.settings(world, method, target=target, **({"source": source} if source else {}))
    return {**given, "name": name, **sections}


@pytest.mark.parametrize("name", OF_PROMPTS)
def test_prompts_move_by_the_rate_times_the_rms_of_the_embeddings(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors of MPT are numbers around 1: on sources they have the relative rate itself."""
    config = tiny_run.load(tmp_path, plain(world, name))
    found: dict[tuple[str, str], float] = {}  # "" marks a stage that was reached
    for number in range(4):
        if ("target", "") in found:
            break
        with tiny_run.stage_of(monkeypatch, config, number) as stage:
            rates = zip(stage.optimizer.group_names, stage.optimizer.rates, strict=True)
            found |= {(stage.stage, tensor): rate for tensor, rate in rates} | {(stage.stage, ""): 0.0}
    assert {stage_name for stage_name, _ in found} >= {"target"} | ({"source"} if method_options(name).HAS_SOURCE_STAGE else set())
    for (stage_name, tensor), rate in ((place, rate) for place, rate in found.items() if place[1]):
        relative = 0.25 if stage_name == "source" else 0.125
        own = relative if (stage_name, tensor) == ("source", "u") else OTHERS.get(tensor)
        assert rate == pytest.approx(own or relative * rms(world), rel=1e-6), (stage_name, tensor)


def test_a_run_is_that_with_the_absolute_rate(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says the rate; a run that is given this number has the same bits."""
    with caplog.at_level(logging.INFO):
        relative = tiny_run.trained(tiny_run.load(tmp_path, plain(world, "bpt", output=str(tmp_path / "relative"))))
    lines = [line for line in caplog.messages if "_relative" in line]
    assert lines == [
        f"{key}: {value * rms(world):.4g}, {key.partition('.')[2]}_relative {value:g} times {rms(world):.4g}, the root mean square "
        "of the word embeddings"
        for key, value in (("method.lr_full", 0.125), ("source.lr", 0.25))
    ]
    given = plain(world, "bpt", output=str(tmp_path / "absolute"))
    (rate,) = {record["metrics"]["source/learning_rate"] for record in records(relative) if record["stage"] == "source"}
    given["source"] |= {"lr": rate, "lr_relative": None}
    given["method"] |= {"lr_full": rate / 2, "lr_full_relative": None}
    absolute = tiny_run.trained(tiny_run.load(tmp_path, given))
    for file in ("source/posterior/posterior.safetensors", "target/mood/adapter/adapter_model.safetensors"):
        assert (relative / file).read_bytes() == (absolute / file).read_bytes(), file


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / layout.METRICS).read_text().splitlines()]


def test_mlflow_has_the_absolute_rate_beside_the_relative_one(world: Path, tmp_path: Path) -> None:
    tracking = {"mlflow": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"}
    run = tiny_run.trained(tiny_run.load(tmp_path, plain(world, "vanilla_transfer", output=str(tmp_path), tracking=tracking)))
    params = json.loads((run / layout.TRACKING).read_text())["params"]
    assert (params["source.lr_relative"], params["target.lr_relative"]) == ("0.25", "0.125")
    assert float(params["source.lr"]) == pytest.approx(0.25 * rms(world), rel=1e-5)
    assert float(params["target.lr"]) == pytest.approx(0.125 * rms(world), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(method_names()) - set(OF_PROMPTS)))
def test_what_is_no_prompt_has_no_rate_in_units_of_the_embeddings(name: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"target.lr_relative: .* method {name} trains is no soft prompt \(got 0.125\); give target"
    ):
        tiny_run.load(tmp_path, plain(world, name))
