"""`bpt-dist methods`: trained numbers against the published counts, and against what T5s of other shapes must give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bpt_dist import config as configuration
from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.commands.main import main
from bpt_dist.commands.table.published import METHOD_NAMES
from bpt_dist.config.method_source import method_names
from bpt_dist.methods._counts import num_trainable
from bpt_dist.tasks import mini

ROOT = Path(__file__).parents[3]

# On T5-base, one target: written out from the shapes in the papers. D = 768, F = 3072, 12 blocks a stack, P = 100, R = 1, 8.
D, F, BLOCKS, P = 768, 3072, 12, 100
NORMS = (2 * BLOCKS + 1 + 3 * BLOCKS + 1) * D
LINEARS = {"encoder": 4 * D + F + D, "decoder": 8 * D + F + D}  # q, k, v, o (twice in the decoder), wi, wo
SINGLE = {
    "prompt_tuning": P * D,
    "vanilla_transfer": P * D,
    "spot": P * D,
    "dept": P * D,  # 40 positions and rank 45: 40 * 768 + 45 * (256 + 768)
    "bpt": P * D + P + D,
    "mpt": P * D + P + D,
    "attempt": P * D + 2 * D * P + 2 * D,
    "lora": 3 * BLOCKS * 2 * 2 * 8 * D,
    "adapters": 4 * BLOCKS * (2 * D * 24 + D + 24) + NORMS,
    "bitfit": BLOCKS * (LINEARS["encoder"] + LINEARS["decoder"]) + NORMS - 2 * D + 32128,  # no bias after a stack: 280,960
}
OF_EIGHT = {"prompt_tuning": 9_600, "bpt": 10_468, "mpt": 10_468, "attempt": 96_192, "adapters": 1_813_440}


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, int]]:
    assert main(["methods", "--json", *words]) == 0
    found: list[dict[str, int]] = json.loads(capsys.readouterr().out)
    return found


def test_counts_on_t5_base_are_those_of_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "--shape", "t5-base")
    assert [set(entry) for entry in found] == [{"name", "trainable_parameters", "trainable_parameters_per_task_of_8"}] * len(found)
    assert [entry["name"] for entry in found] == method_names()
    counted = {str(entry["name"]): entry for entry in found}
    assert {name: counted[name]["trainable_parameters"] for name in SINGLE} == SINGLE
    assert {name: counted[name]["trainable_parameters_per_task_of_8"] for name in OF_EIGHT} == OF_EIGHT
    # Published as 5.16 M with all tasks' embeddings but without the layer norms of the backbone, and as 14.08 M.
    assert counted["hyperformer"]["trainable_parameters"] == 5_162_928 + NORMS + 64
    assert round(counted["hyperdecoder"]["trainable_parameters"] / 1e6, 2) == 14.08


def test_prompts_grow_with_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    for shape, width in (("t5-small", 512), ("t5-large", 1024)):
        counted = {str(entry["name"]): entry["trainable_parameters"] for entry in listed(capsys, "--shape", shape)}
        assert counted["prompt_tuning"] == 100 * width
        assert counted["mpt"] == counted["bpt"] == 100 * width + 100 + width


def test_without_a_shape_the_list_describes(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert [set(entry) for entry in found] == [{"name", "summary", "paper"}] * len(found)
    assert [entry["name"] for entry in found] == method_names()


def test_a_shape_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--shape", "t5-enormous"]) == 2
    assert "--shape: the shape of 't5-enormous' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "config", "times"),
    [
        ("README.md", "quickstart.yaml", 1),
        ("README.md", "table/mini.yaml", 1),
        ("docs/miniature_world.md", "mini_comparison.yaml", 2),
    ],
)
def test_tables_of_the_pages_show_what_the_methods_train(page: str, config: str, times: int) -> None:
    """Tables are copied into pages by hand, and BitFit's stayed when its biases became fewer."""
    loaded = configuration.load(ROOT / "configs" / config, ["seeds=[0]"])
    shape = shape_of(mini.backbone_path(loaded.backbone.path))
    runs = [run.method for run in configuration.expand(loaded)]
    counted = {METHOD_NAMES[method.name]: f"{num_trainable(method.name, shape, 1, method):,}" for method in runs}
    assert tables_of(page).count(counted) == times


def tables_of(page: str) -> list[dict[str, str]]:
    """Return method -> parameters of every table with both, but for the majority row and averaged predictions."""
    tables = re.findall(r"^\| Method \| Parameters a task .*\n(?:\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    rows = (re.findall(r"^\| ([^|*]+?)(?: \[[\w\\]+\]| \(MAP\))? \| ([\d,]+) \| \d", table, re.MULTILINE) for table in tables)
    return [{name: count for name, count in each if not name.endswith("(ensemble)")} for each in rows]
