"""PEFT is the independent reference: what it computes from our folder must be what we compute by hand, bit for bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist.artifacts.model_card import CardFacts, PosteriorFacts
from bpt_dist.artifacts.peft_export import export_low_rank, export_multitask, export_particles, export_prompt
from bpt_dist.backbones.prompts import read_prompt
from bpt_dist.errors import ConfigError, NonFinite, StorageError

WIDTH, LENGTH, VOCABULARY = 32, 5, 256
DATA = Path(os.environ.get("BPT_DATA_ROOT", Path(__file__).resolve().parents[4] / "shared" / "data"))
RESULT = {"task": "rte", "split": "test", "metric": "accuracy", "value": 75.5, "n": 139, "seed": 3}


def make_backbone(folder: Path, *, tied: bool):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        tie_word_embeddings=tied, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from initialisation, so that greedy outputs differ between prompts
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module", params=[True, False], ids=["tied head", "untied head"])
def either_backbone(request, backbone, tmp_path_factory):
    return backbone if request.param else make_backbone(tmp_path_factory.mktemp("untied"), tied=False)


def card(**changes) -> CardFacts:
    facts = {
        "title": "RTE prompt", "method": "bpt", "backbone_hash": "ab" * 32, "tokenizer_hash": "cd" * 32,
        "protocol": "fixed", "target_tasks": ["rte"], "source_tasks": ["mnli", "qnli"], "data": "glue/rte, 2,239 rows",
        "results": [RESULT],
    }  # fmt: skip
    return CardFacts(**{**facts, **changes})


def common(backbone, **changes):
    model, folder = backbone
    return {
        "base_model": str(folder),
        "revision": None,
        "config_facts": model.config.to_dict(),
        "card": card(**changes),
    }


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(2, VOCABULARY, (3, 4), generator=generator)


def by_hand(model, texts, prompts):
    """Return encoder inputs and mask with `prompts` [N, P, D] before the word embeddings."""
    embeds = torch.cat([prompts, model.shared(texts["input_ids"])], dim=1)
    mask = torch.cat([texts["attention_mask"].new_ones(prompts.shape[:2]), texts["attention_mask"]], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": mask}


def under_peft(backbone, folder):
    from peft import PeftModel

    base = T5ForConditionalGeneration.from_pretrained(backbone[1]).eval()
    return PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def test_peft_computes_our_logits_and_our_texts_bit_for_bit(either_backbone, texts, tmp_path):
    model, (inputs, labels) = either_backbone[0], texts
    prompt = torch.randn(LENGTH, WIDTH)
    folder = export_prompt(prompt, tmp_path / "adapter", **common(either_backbone))
    theirs = under_peft(either_backbone, folder)
    ours = by_hand(model, inputs, prompt.expand(3, -1, -1))
    assert torch.equal(theirs(**inputs, labels=labels).logits, model(**ours, labels=labels).logits)
    generated = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(**ours, max_new_tokens=6, do_sample=False))
    without = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert not torch.equal(generated, without), "the prompt must matter, else the test shows nothing"


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
def test_peft_computes_our_multi_target_logits_bit_for_bit(either_backbone, texts, tmp_path, rank):
    model, (inputs, labels) = either_backbone[0], texts
    shared, cols, rows = torch.randn(LENGTH, WIDTH), torch.randn(3, LENGTH, rank), torch.randn(3, rank, WIDTH)
    folder = export_multitask(shared, cols, rows, tmp_path / "adapter", tasks=["a", "b", "c"], **common(either_backbone))
    task_ids = torch.tensor([2, 0, 2])
    ours = by_hand(model, inputs, shared * (cols @ rows)[task_ids])
    theirs = under_peft(either_backbone, folder)
    assert torch.equal(theirs(**inputs, labels=labels, task_ids=task_ids).logits, model(**ours, labels=labels).logits)
    generated = theirs.generate(**inputs, task_ids=task_ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(**ours, max_new_tokens=6, do_sample=False))
    assert "| 2 | c |" in (folder / "README.md").read_text()


def test_the_folder_loads_where_this_package_is_not_installed(backbone, tmp_path):
    folder = export_prompt(torch.randn(LENGTH, WIDTH), tmp_path / "adapter", **common(backbone))
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    program = (
        "import sys; sys.modules['bpt_dist'] = None\n"
        + snippet.replace("PATH OF THIS FOLDER", str(folder))
        + "print(tuple(model.get_prompt(1).shape), model.active_peft_config.num_transformer_submodules)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"(1, {LENGTH}, {WIDTH}) 1"


def test_the_folder_is_the_three_files_of_the_convention(backbone, tmp_path):
    prompt = torch.randn(LENGTH, WIDTH)
    folder = export_prompt(prompt, tmp_path / "adapter", **(common(backbone) | {"revision": "a1b2c3"}))
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert list(tmp_path.iterdir()) == [folder], "no leftovers beside it"
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": LENGTH, "token_dim": WIDTH,
        "num_transformer_submodules": 1, "num_layers": 2, "num_attention_heads": 4, "inference_mode": True,
        "revision": "a1b2c3", "base_model_name_or_path": str(backbone[1]),
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == {"prompt_embeddings"}
    assert torch.equal(tensors["prompt_embeddings"], prompt)


# The fields of PEFT 0.6.0's configurations, read from its source.
PEFT_0_6_0 = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"}
PROMPT_0_6_0 = PEFT_0_6_0 | {
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
}  # fmt: skip
MULTITASK_0_6_0 = PROMPT_0_6_0 | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks", "num_tasks"}
LORA_0_6_0 = PEFT_0_6_0 | {
    "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip


def test_an_export_has_no_key_that_an_older_peft_does_not_know(backbone, tmp_path):
    from peft import PeftConfig

    pairs = {"encoder.block.0.layer.0.SelfAttention.q": (torch.ones(2, WIDTH), torch.ones(WIDTH, 2))}
    low_rank = {key: value for key, value in common(backbone).items() if key != "config_facts"}
    shared, cols, rows = torch.ones(LENGTH, WIDTH), torch.ones(2, LENGTH, 1), torch.ones(2, 1, WIDTH)
    folders = {
        export_prompt(shared, tmp_path / "prompt", **common(backbone)): PROMPT_0_6_0,
        export_particles(shared[None], tmp_path / "particles", **common(backbone)) / "mean": PROMPT_0_6_0,
        export_multitask(shared, cols, rows, tmp_path / "tasks", tasks=["a", "b"], **common(backbone)): MULTITASK_0_6_0,
        export_low_rank(pairs, 4.0, tmp_path / "lora", **low_rank): LORA_0_6_0,
    }
    for folder, keys in folders.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.keys() <= keys
        # What was left out is at its default: a PEFT that knows more reads the same.
        read = PeftConfig.from_pretrained(folder)
        defaults, left_out = type(read)(), vars(read).keys() - config.keys()
        assert left_out, "this PEFT knows no more than 0.6.0: the test shows nothing"
        assert all(getattr(read, key) == getattr(defaults, key) for key in left_out)
        assert "PEFT 0.6.0 and later versions read it" in (folder / "README.md").read_text()


def test_export_leaves_the_random_state_alone(backbone, tmp_path):
    state = torch.random.get_rng_state()
    export_prompt(torch.ones(LENGTH, WIDTH), tmp_path / "adapter", **common(backbone))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_particles_and_their_mean_are_exported(backbone, tmp_path):
    particles = torch.randn(3, LENGTH, WIDTH)
    folder = export_particles(particles, tmp_path / "posterior", **common(backbone))
    assert sorted(f.name for f in (folder / "particles").iterdir()) == ["00", "01", "02"]
    for m in range(3):
        assert torch.equal(read_prompt(folder / "particles" / f"{m:02d}", WIDTH), particles[m])
    mean = read_prompt(folder / "mean", WIDTH)
    torch.testing.assert_close(mean.double(), particles.double().mean(0), rtol=0, atol=1e-6)


def test_a_second_export_replaces_the_first_and_nothing_else(backbone, tmp_path):
    first, second = torch.zeros(LENGTH, WIDTH), torch.ones(LENGTH, WIDTH)
    folder = export_prompt(first, tmp_path / "adapter", **common(backbone))
    export_prompt(second, folder, **common(backbone))
    assert torch.equal(read_prompt(folder, WIDTH), second)
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not an export; remove it or choose another folder"):
        export_prompt(second, tmp_path / "thesis", **common(backbone))
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years of work"


def test_a_failed_export_leaves_the_earlier_one_whole(backbone, tmp_path):
    folder = export_prompt(torch.zeros(LENGTH, WIDTH), tmp_path / "adapter", **common(backbone))
    broken = [{**RESULT, "value": "high"}]  # the card is written last, so this fails after the weights were written
    with pytest.raises(ValueError, match="format code"):
        export_prompt(torch.ones(LENGTH, WIDTH), folder, **common(backbone, results=broken))
    assert torch.equal(read_prompt(folder, WIDTH), torch.zeros(LENGTH, WIDTH))
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_exported_is_refused(backbone, tmp_path):
    with pytest.raises(ConfigError, match="8 wide, the backbone 32"):
        export_prompt(torch.ones(LENGTH, 8), tmp_path / "a", **common(backbone))
    with pytest.raises(NonFinite, match="NaN or infinity"):
        export_prompt(torch.full((LENGTH, WIDTH), torch.nan), tmp_path / "a", **common(backbone))
    with pytest.raises(ConfigError, match="one of each per task"):
        cols, rows = torch.ones(2, LENGTH, 1), torch.ones(2, 1, WIDTH)
        export_multitask(torch.ones(LENGTH, WIDTH), cols, rows, tmp_path / "a", tasks=["x"], **common(backbone))
    assert list(tmp_path.iterdir()) == []


def test_the_card_states_what_a_reader_must_know(backbone, tmp_path):
    from huggingface_hub import ModelCard

    posterior = PosteriorFacts.of(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 1.0]]]), steps=120)
    assert (posterior.distance_min, posterior.distance_max) == pytest.approx((1.0, 5.0))
    assert posterior.distance_median == pytest.approx(18**0.5)
    assert posterior.norm_of_mean == pytest.approx((1 + 25 / 9) ** 0.5)
    assert posterior.mean_norm == pytest.approx(2.0)
    folder = export_prompt(
        torch.ones(LENGTH, WIDTH), tmp_path / "adapter",
        **(common(backbone, posterior=posterior) | {"base_model": "t5-base", "revision": "a1b2c3"}),
    )  # fmt: skip
    written = ModelCard.load(folder / "README.md")
    for fact in (
        "5 positions x 32 numbers", "bpt", "`t5-base`, revision `a1b2c3`", "ab" * 32, "cd" * 32, "mnli, qnli",
        "glue/rte, 2,239 rows", "| rte | test | accuracy | 75.5 | 139 | 3 |", "revision='a1b2c3'",
        "3 particles after 120 steps",
    ):  # fmt: skip
        assert fact in written.text, fact
    assert "More Information Needed" not in written.content
    assert written.data.base_model == "t5-base"
    assert written.data.library_name == "peft"
    (measured,) = written.data.eval_results
    assert (measured.dataset_name, measured.metric_type, measured.metric_value) == ("rte", "accuracy", 75.5)


def test_a_local_backbone_is_no_hub_id_in_the_metadata(backbone, tmp_path):
    folder = export_prompt(torch.ones(LENGTH, WIDTH), tmp_path / "adapter", **common(backbone))
    metadata = (folder / "README.md").read_text().split("---")[1]
    assert "base_model" not in metadata
    assert str(backbone[1]) not in metadata


def test_one_particle_has_no_distances():
    facts = PosteriorFacts.of(torch.ones(1, 2, 2), steps=1)
    assert (facts.distance_min, facts.distance_max, facts.norm_of_mean) == (0.0, 0.0, 2.0)


# --- reading the prompts of others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("t5_1_1_lm100k_base-sst2.npy", 51.771),
        ("t5_1_1_lm100k_base-rte.npy", 34.501),
        ("t5_1_1_lm100k_base-mrpc.npy", 32.296),
        ("t5_base-record.safetensors", 1.015),
    ],
)
def test_released_prompts_are_read(name, deviation):
    path = DATA / "prompts" / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set BPT_DATA_ROOT to a data folder with prompts/")
    prompt = read_prompt(path, 768)
    assert prompt.shape == (100, 768)
    assert prompt.dtype == torch.float32
    assert float(prompt.std(correction=0)) == pytest.approx(deviation, abs=2e-3)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: the prompt is 768 wide, the backbone 1024; choose"):
        read_prompt(path, 1024)


@pytest.mark.parametrize("name", ["prompt", "prompt_embeddings", "mean", "anything"])
def test_a_safetensors_prompt_may_have_any_usual_name(tmp_path, name):
    prompt = torch.randn(LENGTH, WIDTH)
    others = {} if name == "anything" else {"particles": torch.randn(2, LENGTH, WIDTH)}
    save_file({name: prompt, **others}, tmp_path / "p.safetensors")
    assert torch.equal(read_prompt(tmp_path / "p.safetensors", WIDTH), prompt)


def test_a_numpy_prompt_of_any_float_type_is_read_as_float32(tmp_path):
    prompt = np.random.default_rng(0).normal(size=(LENGTH, WIDTH))
    np.save(tmp_path / "p.npy", prompt)
    assert torch.equal(read_prompt(tmp_path / "p.npy", WIDTH), torch.from_numpy(prompt).float())


def test_folders_that_peft_wrote_itself_are_read(backbone, texts, tmp_path):
    from peft import MultitaskPromptTuningConfig, PromptTuningConfig, get_peft_model

    model = T5ForConditionalGeneration.from_pretrained(backbone[1])
    two = get_peft_model(model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH))
    two.save_pretrained(tmp_path / "two", save_embedding_layers=False)  # PEFT's default of two submodules
    assert torch.equal(read_prompt(tmp_path / "two", WIDTH), two.get_prompt(1)[0, :LENGTH])
    model = T5ForConditionalGeneration.from_pretrained(backbone[1])
    config = MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=LENGTH,
        num_tasks=2,
        num_ranks=1,
        num_transformer_submodules=1,
    )
    many = get_peft_model(model, config)
    many.save_pretrained(tmp_path / "many", save_embedding_layers=False)
    expected = many.get_prompt(1, task_ids=torch.tensor([1]))[0]
    assert torch.equal(read_prompt(tmp_path / "many", WIDTH, task=1), expected)
    with pytest.raises(ConfigError, match="holds prompts of 2 tasks"):
        read_prompt(tmp_path / "many", WIDTH)
    with pytest.raises(ConfigError, match="task 2 asked for, it holds tasks 0 to 1"):
        read_prompt(tmp_path / "many", WIDTH, task=2)


def _write(path: Path, content) -> Path:
    if isinstance(content, dict):
        save_file(content, path)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.npy", np.array([{"a": 1}], dtype=object), "not a plain NumPy array"),
        ("p.npy", np.ones((3, 4), dtype=np.int64), "holds int64, expected floating-point"),
        ("p.npy", np.ones(4), r"shape \[4\], expected \[positions, 4\]"),
        ("p.npy", np.ones((0, 4)), r"shape \[0, 4\]"),
        ("p.npy", np.ones((4, 7)), "7 wide, the backbone 4; transpose it"),
        ("p.npy", np.full((3, 4), np.inf), "holds NaN or infinity"),
        ("p.npy", b"garbage", "not a plain NumPy array"),
        ("p.safetensors", b"garbage", "not a safetensors file"),
        (
            "p.safetensors",
            {"a": torch.ones(1, 4), "b": torch.ones(1, 4)},
            "holds tensors a, b; call the prompt's 'prompt'",
        ),
        ("p.pt", b"anything", "files of type '.pt' are not read"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused_by_name(tmp_path, name, content, message):
    path = _write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompt(path, 4)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "cannot be read"),
        ([], "holds list, expected an object"),
        ({"peft_type": "LORA"}, "peft_type is LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "no adapter_model.safetensors"),
    ],
)
def test_a_folder_that_is_no_peft_prompt_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_prompt(tmp_path, 4)
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_prompt(tmp_path / "absent", 4)
