"""Recipes for clusters that the tests have not got: their syntax, and that what they name exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from bpt_dist import config as configuration
from bpt_dist.commands.check import hostfile
from bpt_dist.commands.main import app
from bpt_dist.config.processes import check_processes
from bpt_dist.errors import ConfigError

ROOT = Path(__file__).parents[3]
SBATCH = ROOT / "launcher/slurm/train.sbatch"
TRAINJOB = ROOT / "launcher/kubernetes/trainjob.yaml"
# Fields of TrainJob.spec.trainer in Kubeflow Trainer 2.0 to 2.2, API trainer.kubeflow.org/v1alpha1.
TRAINER_FIELDS = {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}


def documents() -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(TRAINJOB.read_text())}


def test_the_example_of_a_hostfile_is_one():
    assert hostfile.read_hostfile(ROOT / "hostfile.example") == [("node0.example", 2), ("node1.example", 2)]


def test_the_batch_script_is_shell_and_its_options_come_first():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    lines = SBATCH.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert len(options) >= 4
    assert max(options) < min(commands), "sbatch reads options up to the first command"
    # The guard of a rank leaves within 20 s of a signal; Slurm sends it in time and restarts nothing by itself.
    assert "#SBATCH --signal=TERM@120" in lines


@pytest.mark.parametrize("script", [SBATCH, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shell_scripts_have_no_known_mistakes(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_trainjob_fits_its_runtime_and_this_project():
    found = documents()
    job, runtime = found["TrainJob"], found["TrainingRuntime"]
    assert {job["apiVersion"], runtime["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert set(job["spec"]) == {"runtimeRef", "trainer"}
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    trainer = job["spec"]["trainer"]
    assert set(trainer) <= TRAINER_FIELDS
    arguments = trainer["args"]
    script, option, config, *overrides = arguments
    assert (ROOT / script).is_file()
    assert option == "--config"
    settings = configuration.load(ROOT / config, overrides)
    assert settings.distribution.expect_world_size == trainer["numNodes"] * trainer["numProcPerNode"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert str(settings.output) == mounted["runs"]
    claim = next(volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "runs")
    assert found["PersistentVolumeClaim"]["metadata"]["name"] == claim
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert trainer["image"] == container["image"]
    assert pod["terminationGracePeriodSeconds"] > 25


def test_the_image_has_an_init_process_no_root_and_what_it_copies():
    text = (ROOT / "Dockerfile").read_text()
    instructions = dict(re.findall(r"^(ENTRYPOINT|USER|CMD) (.*)$", text, re.MULTILINE))
    assert yaml.safe_load(instructions["ENTRYPOINT"])[:2] == ["tini", "-g"]
    assert instructions["USER"] == "bpt"
    assert documents()["TrainJob"]["spec"]["trainer"]["command"][:2] == ["tini", "-g"]
    assert re.search(r"apt-get install .*\btini\b", text)
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source not in ignored


def test_the_image_of_the_service_starts_what_its_example_says():
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(stages) == ["base", "serve", "train"], "what is built without --target trains"
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", stages["serve"], re.MULTILINE)
    assert yaml.safe_load(entry) == ["tini", "-g", "--", "bpt-dist", "serve"]
    assert "[serve]" in stages["base"]
    (example,) = re.findall(r"^# docker run .* bpt_serve (.*)$", text, re.MULTILINE)
    command = typer.main.get_command(app).commands["serve"]
    given = command.make_context("serve", example.split()).params
    assert (given["host"], given["port"]) == ("0.0.0.0", 8000)
    assert f":{given['token_file']}:ro" in text
    assert f":{given['prompts'][0]}:ro" in text


def test_the_example_of_the_image_can_work_on_its_processes():
    """Rows of the quick start shard the backbone, which a process without a launcher cannot do."""
    (example,) = re.findall(r"^# docker run .* bpt_dist (-m .*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    words = example.split()
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert (ROOT / words[words.index("--config") - 1]).is_file()
    runs = configuration.expand(configuration.load(ROOT / words[words.index("--config") + 1]))
    check_processes(runs, int(words[words.index("--nproc-per-node") + 1]), launched=True)
    with pytest.raises(ConfigError, match="needs a process group"):
        check_processes(runs, 1, launched=False)
