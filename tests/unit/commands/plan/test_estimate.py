"""Plans against the real thing: a loaded T5, a counted pass, a trained run, recorded collectives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_run
import tiny_t5
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist import config as configuration
from bpt_dist import train
from bpt_dist.backbones import loading
from bpt_dist.backbones.t5.shapes import ShapeBackbone, shape_of
from bpt_dist.commands.main import main
from bpt_dist.commands.output import duration, size
from bpt_dist.commands.plan.estimate import Plan, estimate, plans
from bpt_dist.commands.plan.stages import PlannedWorld, num_optimizer_states
from bpt_dist.commands.plan.text import plan
from bpt_dist.data.batches import Batch
from bpt_dist.distributed import device as distributed_device
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.methods.prompt_tuning import Config as PromptConfig
from bpt_dist.methods.prompt_tuning import PromptTuning
from bpt_dist.storage import checkpoint

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def settings_of(world: Path, tmp_path: Path, method: dict, **sections):
    return tiny_run.load(tmp_path, tiny_run.settings(world, method, **sections))


def stage(found: Plan, name: str):
    (chosen,) = [each for each in found.stages if each.name == name]
    return chosen


# --- the T5 without its weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_is_that_of_the_loaded_model(tmp_path, tied):
    folder = tiny_t5.make(tmp_path, tied=tied)
    loaded = loading.load(str(folder)).model
    assert shape_of(str(folder)).num_parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("t5-small", 60_506_624), ("google-t5/t5-base", 222_903_552), ("t5-large", 737_668_096), ("google/t5-v1_1-base", 247_577_856)],
)
def test_published_t5s_are_known_by_name(name, parameters, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert shape_of(name).num_parameters == parameters


def test_an_unknown_t5_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"backbone\.path: .* has no config\.json; give a folder"):
        shape_of(str(tmp_path))
    with pytest.raises(ConfigError, match=r"backbone\.path: the shape of .* is not known here"):
        shape_of(str(tmp_path / "nothing"))


@pytest.mark.parametrize("trains_weights", [False, True])
def test_flops_and_activations_are_those_of_a_real_pass(tmp_path, trains_weights):
    backbone = loading.load(str(tiny_t5.make(tmp_path, layers=3)), attention="eager")
    backbone.model.requires_grad_(trains_weights)
    method = PromptTuning(PromptConfig(length=5), backbone, seed=0, reduction="token_mean")
    method.own(torch.randn(1, 5, backbone.width))
    ids = torch.randint(3, 100, (1, 11))
    batch = Batch(0, ids, torch.ones_like(ids), ids[:, :4], torch.zeros(1, dtype=torch.long), ("row",), torch.ones(1))
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.loss(method(batch), batch)
        forward = counter.get_total_flops()
        loss.backward()
    cost = shape_of(str(tmp_path)).row_cost(5, 11, 4, trains_weights=trains_weights)
    assert cost.forward_flops == forward
    assert cost.flops == counter.get_total_flops()
    real = sum(number for pointer, number in kept.items() if pointer not in weights)
    assert cost.activation_bytes == pytest.approx(real, rel=0.1)


def test_flops_of_t5_base_are_the_closed_form():
    # Every product of the encoder, the cross-attention and the decoder; multiply-add counts two.
    length, target, width, inner, vocabulary, layers = 356, 4, 768, 3072, 32128, 12
    encoder = 2 * length * layers * (4 * width**2 + 2 * width * inner) + 4 * layers * length**2 * width
    cross = 4 * layers * length * width**2 + 4 * layers * target * length * width
    decoder = 2 * target * layers * (6 * width**2 + 2 * width * inner) + 4 * layers * target**2 * width
    assert (
        shape_of("t5-base").row_cost(100, 256, target).forward_flops == encoder + cross + decoder + 2 * target * width * vocabulary
    )


# --- a run -----------------------------------------------------------------------------------------------------


def test_a_trained_run_has_the_planned_sizes(world, tmp_path):
    config = settings_of(world, tmp_path, {"name": "bpt"}, output=str(tmp_path / "runs"))
    found = estimate(config, 1)
    folder = tiny_run.trained(config)
    for entry in json.loads((folder / "results.json").read_text()):
        assert stage(found, entry["stage"]).trainable_parameters == entry["trainable_parameters"]
    for each in found.stages:
        newest = sorted((folder / each.name / "checkpoints").glob("step-*/state.safetensors"))[-1]
        assert each.checkpoint_bytes == pytest.approx(_tensor_bytes(newest), abs=64), (
            "step counters of the optimizer are not counted"
        )


def _tensor_bytes(file: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("name", configuration.method_names())
def test_every_method_can_be_planned(world, tmp_path, name):
    config = settings_of(world, tmp_path, {"name": name})
    found = estimate(config, 1)
    mains = [each.name for each in found.stages if each.name.count("/") == 1]  # beside the source stage and preludes
    assert mains[-2:] == ["target/mood", "target/count"]
    assert all(each.trainable_parameters > 0 and each.flops > 0 for each in found.stages)
    if config.method.TRAINS_BACKBONE:
        assert found.stages[0].trainable_parameters == found.num_parameters


def test_rows_passes_and_copies(world, tmp_path):
    ensemble = {"evaluation": {"predict": "ensemble", "batch_size": 4}, "data": {"max_eval_rows": 6}}
    config = settings_of(world, tmp_path, {"name": "bpt", "num_particles": 4}, source={"batch_size": 3}, **ensemble)
    found = estimate(config, 2)
    source, target = stage(found, "source"), stage(found, "target/mood")
    # 2 source tasks of 3 texts, 4 particles on 2 ranks; the target adapts the MAP prompt and all 4 particles.
    assert (source.mesh, source.particles_per_rank, source.texts) == ((2, 1), 2, 6)
    assert (source.rows, source.rows_per_rank, source.rows_at_once) == (24, 12, 12)
    assert (target.mesh, target.num_particles, target.rows, target.rows_per_rank) == ((1, 2), 5, 15, 10)
    # 3 steps, validated every 2 and at the end, then one split by MAP and by ensemble: 4 evaluations of 6 rows.
    assert target.evaluation_passes == 4
    best = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"predict": "best"})})
    assert stage(estimate(best, 2), "target/mood").evaluation_passes == 8  # each of the 4 particles is validated once more
    apart = estimate(config.model_copy(update={"source": config.source.model_copy(update={"shared_texts": False})}), 2)
    assert (stage(apart, "source").passes_per_step, stage(apart, "source").rows_at_once) == (2, 6)
    assert stage(apart, "source").activation_bytes == source.activation_bytes // 2


def test_preludes_are_stages_of_the_plan(world, tmp_path):
    config = settings_of(world, tmp_path, {"name": "spot", "probe_steps": 7})
    found = estimate(config, 1)
    auxiliary_phases = {each.name: each.steps for each in found.stages if each.evaluation_passes == 0 and each.steps == 7}
    assert auxiliary_phases == {"source/keys": 7, "target/mood/probe": 7, "target/count/probe": 7}


def test_a_mixture_may_take_every_text_from_the_longest_task(world, tmp_path):
    data = {"source_tasks": ["count", "colour"]}  # free text of 4 tokens beside one label word
    lone = settings_of(world, tmp_path, {"name": "bpt"}, data={"source_tasks": ["count"]}, source={"batch_size": 4})
    mixed = settings_of(world, tmp_path, {"name": "bpt"}, data=data, source={"batch_size": 2, "sampling": "temperature"})
    evenly = settings_of(world, tmp_path, {"name": "bpt"}, data=data, source={"batch_size": 2})
    flops = [stage(estimate(config, 1), "source").flops for config in (lone, mixed, evenly)]
    assert flops[0] == flops[1] > flops[2]


def test_planned_collectives_are_the_ones_a_step_makes(world, tmp_path):
    config = settings_of(world, tmp_path, {"name": "bpt", "num_particles": 4})
    planned = {each.name: each for each in stage(estimate(config, 2), "source").collectives}
    gathered: list[int] = []

    class Recording(Mesh):
        def start_gather_particles(self, local):
            whole = torch.cat([local, local + 1])
            gathered.append(whole.nbytes)
            return lambda: whole

    grid = PlannedWorld(0, 2).mesh(4)
    mesh = Recording(grid.world, grid.particle, grid.data)
    method = methods.load(config, ShapeBackbone(shape_of(str(world / "t5"))))
    method.begin_source([], mesh)
    method.particles.grad = torch.randn_like(method.particles)
    method.precondition_(mesh)
    gathers = planned["all-gather of particles and of scores"]
    assert (gathers.calls, gathers.bytes) == (len(gathered), sum(gathered) / 2), "half of it is a rank's own"
    agreed = planned["all-gather of flags and losses"]
    assert agreed.bytes == 8 * (6 + 2 * 2), "from the other rank six numbers, and for each of two tasks a sum and a count"


@pytest.mark.parametrize("exact", [False, True])
def test_the_agreed_numbers_are_as_many_as_planned(world, tmp_path, monkeypatch, exact):
    config = settings_of(world, tmp_path, {"name": "bpt", "num_particles": 4}, distribution={"exact": exact})
    planned = {each.name: each for each in stage(estimate(config, 2), "source").collectives}
    with tiny_run.stage_of(monkeypatch, config) as found:
        sent = []
        monkeypatch.setattr(World, "gather_numbers", lambda world, values: sent.append(len(values)) or [values])
        losses = train.accumulate_gradients(found)
        found.agree(losses, False)
    assert planned["all-gather of flags and losses"].bytes == 8 * sent[0]


@pytest.mark.parametrize(
    ("section", "passes", "at_once"),
    [
        ({}, 1, 8),
        ({"source": {"pass_size": 3}}, 4, 2),
        ({"source": {"pass_size": 4}}, 2, 4),
        ({"distribution": {"exact": True}}, 8, 1),
    ],
)
def test_smaller_passes_are_planned_as_they_are_made(world, tmp_path, monkeypatch, section, passes, at_once):
    config = settings_of(world, tmp_path, {"name": "bpt"}, **section)
    planned = stage(estimate(config, 1), "source")
    with tiny_run.stage_of(monkeypatch, config) as found:
        units = list(found.work(0))
    assert (planned.passes_per_step, planned.rows_at_once) == (passes, at_once)
    sizes = [(unit.particles.stop - unit.particles.start) * len(unit.batch) for unit in units]
    assert (len(sizes), max(sizes)) == (passes, at_once)


def test_optimizer_states():
    states = {name: num_optimizer_states(configuration.StageConfig(optimizer=name)) for name in ("adamw", "sgd", "rmsprop")}
    assert states == {"adamw": 2, "sgd": 0, "rmsprop": 1}


def test_partitioning_shrinks_what_a_rank_holds():
    config = configuration.load(ROOT / "configs" / "bpt" / "t5_large_6.yaml", ["seeds=0"])
    ((found, _),) = plans(config, 5, ranks_here=1)
    assert found.num_parameters == 737_668_096
    assert found.weight_bytes == 2 * found.num_parameters
    assert found.resident_weight_bytes == -(-found.weight_bytes // 5)
    # Two of 24 + 24 blocks, and the head.
    table = 2 * 32_128 * 1024
    assert found.gathered_weight_bytes == 2 * ((found.weight_bytes - table) // 48) + table
    source = stage(found, "source")
    assert (source.rows, source.trainable_parameters) == (30, 5 * 100 * 1024)
    assert any("T5 blocks" in each.name for each in source.collectives)
    assert found.memory_bytes > found.weight_bytes, "T5 is loaded whole before it is partitioned"


def test_a_scope_and_recomputed_blocks_are_planned_for(world, tmp_path):
    options = {"shard": "fsdp2", "scope": "node", "activation_checkpointing": True}
    kept, again = (settings_of(world, tmp_path, {"name": "bpt"}, distribution=each) for each in ({}, options))
    (plain, parts) = (estimate(config, 2, ranks_here=1) for config in (kept, again))
    assert (parts.sharers, parts.resident_weight_bytes, parts.gathered_weight_bytes) == (1, plain.weight_bytes, 0)
    assert estimate(again, 2, ranks_here=2).resident_weight_bytes == -(-plain.weight_bytes // 2)
    before, after = stage(plain, "source"), stage(parts, "source")
    assert after.activation_bytes < before.activation_bytes
    # Blocks forward, forward again and backward; the head, about half of so small a T5, once.
    assert 1.1 < after.flops / before.flops < 1.5


def test_a_t5_trained_in_parts_takes_a_part_of_each_state(world, tmp_path):
    config = settings_of(world, tmp_path, {"name": "fine_tuning"}, distribution={"shard": "deepspeed"})
    one, two = (estimate(config, size, ranks_here=1).stages[0] for size in (1, 2))
    assert two.optimizer_bytes == one.optimizer_bytes // 2
    assert two.checkpoint_bytes == one.checkpoint_bytes


# --- refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_be_arranged_is_refused_with_what_can(world, tmp_path):
    explicit = settings_of(world, tmp_path, {"name": "bpt"}, distribution={"mesh": {"particle": 2, "data": 1}})
    with pytest.raises(ConfigError, match=r"possible \(particle x data\): 1 x 3"):
        estimate(explicit, 3)
    expecting = settings_of(world, tmp_path, {"name": "bpt"}, distribution={"expect_world_size": 2})
    with pytest.raises(ConfigError, match="expect_world_size is 2"):
        estimate(expecting, 1)


def test_idle_ranks_are_planned_with_a_warning(world, tmp_path):
    config = settings_of(world, tmp_path, {"name": "bpt"})
    found = estimate(config, 4)
    (warning,) = found.warnings
    assert warning.startswith("target.batch_size: a step has 3 text(s) for 4 ranks of the data axis, so 1 of 4 ranks have no texts")
    assert f"warning      {warning}" in plan(config, 4)
    assert estimate(config, 3).warnings == ()


def test_the_price_of_exact_is_that_of_its_passes(world, tmp_path):
    plain, exact = (settings_of(world, tmp_path, {"name": "bpt"}, distribution={"exact": flag}) for flag in (False, True))
    for before, after in zip(estimate(plain, 2).stages, estimate(exact, 2).stages, strict=True):
        assert before.exact_passes_per_step == after.exact_passes_per_step == after.passes_per_step
    assert re.search(r"exact +source: 4 passes of one particle and one text a rank and step \(1 here\)", plan(plain, 2))


def test_too_little_memory_is_refused_with_the_largest_parts(world, tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text(f"{700 << 20}\n")
    monkeypatch.setattr(distributed_device, "CGROUP_LIMIT", limit)
    config = settings_of(world, tmp_path, {"name": "bpt"})
    assert estimate(config, 1).device.memory == 700 << 20
    with pytest.raises(ConfigError, match=r"needs .* MiB and has 350 MiB .*, 2 on this machine\)"):
        estimate(config, 2)
    assert estimate(config, 2, ranks_here=1).device.memory == 700 << 20


# --- text ------------------------------------------------------------------------------------------------------


def test_units():
    assert [size(number) for number in (12, 2048, 3.5 * 2**20, 2**31, 2**42)] == ["12 B", "2 KiB", "3.5 MiB", "2 GiB", "4 TiB"]
    assert [duration(number) for number in (0.05, 2, 90, 7200, 172800)] == ["50 ms", "2.0 s", "1.5 min", "2.0 h", "2.0 days"]


def test_the_text_tells_runs_apart_and_adds_them_up(world, tmp_path):
    plain = tiny_run.settings(world, {"name": "bpt"}) | {
        "rows": [{"label": "few"}, {"label": "many", "method": {"num_particles": 4}}]
    }
    config = tiny_run.load(tmp_path, plain | {"seeds": [0, 1, 2]})
    text = plan(config, 1)
    assert re.findall(r"^(\S+) \(and 2 more with other seeds\)", text, re.MULTILINE) == ["few-s0", "many-s0"]
    assert "6 runs one after another" in text
    assert "none: one process" in text


def test_the_commands_print_the_plan(world, tmp_path, capsys):
    settings_of(world, tmp_path, {"name": "bpt"})
    assert main(["plan", "-c", str(tmp_path / "config.yaml"), "num_particles=4", "--world", "2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 2
    assert found["stages"][0]["particles_per_rank"] == 2
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["stages"]))
    assert main(["plan", "-c", str(tmp_path / "config.yaml")]) == 0
    assert f"{found['num_parameters']:,} parameters" in capsys.readouterr().out


# --- against what a run takes ----------------------------------------------------------------------------------


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "method",
    [{"name": "bpt", "num_particles": 40, "length": 20}, {"name": "bpt", "num_particles": 4, "length": 60}, {"name": "fine_tuning"},
     {"name": "lora", "rank": 16}, {"name": "mpt", "length": 60}, {"name": "attempt", "length": 60}],
    ids=lambda method: method["name"],
)  # fmt: skip
def test_the_disk_is_what_a_run_takes(tmp_path, monkeypatch, method):
    """Of three checkpoints that are there at once the plan counted two, and nothing of what a stage leaves."""
    world = tiny_run.world(tmp_path, width=128)  # so wide that names of tensors and the like do not count
    stages = {"steps": 4, "checkpoint_every": 1}
    sections = {"target": {**stages, **({"lr": 0.01} if method["name"] == "lora" else {})}}
    if method["name"] not in ("fine_tuning", "lora"):
        sections["source"] = stages
    config = settings_of(world, tmp_path, method, output=str(tmp_path / "runs"), **sections)
    most, delete = [0], checkpoint._delete_older
    monkeypatch.setattr(checkpoint, "_delete_older", lambda *args: [most.append(on_disk(config.directory)), delete(*args)][1])
    folder = tiny_run.trained(config)
    found = estimate(config, 1)
    assert found.kept_bytes == pytest.approx(on_disk(folder), rel=0.15)
    assert found.disk_bytes == pytest.approx(max(*most, on_disk(folder)), rel=0.15)


def most_at_once(work) -> int:
    """The most bytes that `work` has allocated at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", "fp32"), ("eager", "fp32"), ("sdpa", "bf16"), ("eager", "bf16")])
@pytest.mark.parametrize("gated", [False, True])
def test_the_memory_of_an_evaluation_is_what_it_takes(tmp_path, gated, attention, dtype):
    """32 texts under 8 hypotheses at once, which the plan did not count at all."""
    folder = tiny_t5.make(tmp_path, width=64)
    if gated:
        facts = json.loads((folder / "config.json").read_text())
        facts = {key: value for key, value in facts.items() if key not in ("is_gated_act", "dense_act_fn")}
        config = T5Config(**{**facts, "feed_forward_proj": "gated-gelu", "d_ff": 192})
        T5ForConditionalGeneration(config).save_pretrained(folder)
    backbone = loading.load(str(folder), dtype=dtype)
    backbone.use_packed_pass(attention)
    method = PromptTuning(PromptConfig(length=50), backbone, seed=0, reduction="token_mean")
    method.own(torch.randn(8, 50, backbone.width))
    ids = torch.randint(3, 100, (32, 40))
    batch = Batch(0, ids, torch.ones_like(ids), ids[:, :2], torch.zeros(32, dtype=torch.long), ("row",) * 32, torch.ones(32))
    words = torch.tensor([[5, 1], [6, 1], [7, 1]])
    method.rank(batch, words, "map")  # what is made once, such as the bias, is there
    assert bool(backbone.model.config.is_gated_act) == gated
    planned = 32 * 8 * shape_of(str(folder), dtype=dtype).prediction_bytes(50, 40, 3, attention)
    assert planned == pytest.approx(most_at_once(lambda: method.rank(batch, words, "map")), rel=0.15)


def test_the_attention_of_an_evaluation_is_that_which_is_usually_faster(world, tmp_path, monkeypatch):
    """In bf16 a CPU computes attention by plain products, whose scores were not counted where nothing was chosen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def planned(attention: str) -> int:
        backbone = {"dtype": "bf16", "attention": attention}
        config = settings_of(world, tmp_path, {"name": "prompt_tuning"}, backbone=backbone)
        return stage(estimate(config, 1), "target/mood").evaluation_bytes

    assert planned("auto") == planned("eager") > planned("sdpa")


def test_an_ensemble_counts_all_hypotheses_that_predict_at_once(world, tmp_path):
    data = {"max_eval_rows": 100}
    one, many = (
        estimate(settings_of(world, tmp_path, {"name": "bpt", "num_particles": 64}, evaluation=evaluation, data=data), 1)
        for evaluation in ({"batch_size": 16}, {"batch_size": 16, "predict": "ensemble"})
    )
    assert stage(many, "target/mood").evaluation_bytes == 64 * stage(one, "target/mood").evaluation_bytes
    assert many.memory_bytes > one.memory_bytes


@pytest.mark.parametrize(("dtype", "of_weights"), [("fp32", 1), ("bf16", 2)])
def test_fine_tuning_counts_the_pretrained_weights_and_the_float32_copies(world, tmp_path, dtype, of_weights):
    """Beside the weights: the pretrained ones, gradients and the best so far in float32; of bf16 weights float32 copies, too."""
    found = estimate(settings_of(world, tmp_path, {"name": "fine_tuning"}, backbone={"dtype": dtype}), 1)
    pretrained, whole = found.weight_bytes, found.num_parameters * 4
    assert stage(found, "target/mood").trained_bytes == pretrained + whole * (of_weights + 1)


def test_mt5_is_planned_as_it_is_trained(tmp_path):
    folder = tiny_t5.make(tmp_path, tied=False)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**facts, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]})
    )
    loaded = loading.load(str(folder)).model
    assert shape_of(str(folder)).num_parameters == sum(parameter.numel() for parameter in loaded.parameters())
