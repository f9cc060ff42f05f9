"""`peanut-serve deploy --classify` without a cluster: what is written, and what is refused before."""

import json
from pathlib import Path

import pytest
import yaml
from support.commands import Run
from support.paths import ROOT

from converters.inference.kinds import ModelKind
from converters.serving import hash_file
from peanut_serve.ray.classifiers.settings import ClassifierSettings, Tunables
from peanut_serve.ray.declaration import declaration


def write_task(folder: Path, name: str, task: str = "text-classification") -> None:
    """What names a task, and a graph that nobody loads."""
    folder.mkdir(exist_ok=True)
    graph = folder / f"{name}.onnx"
    graph.write_bytes(name.encode())
    own = {
        "models": {"fp32": graph.name},
        "files": {graph.name: hash_file(graph)},
        "base": "a-base",
        "adapter": None,
        "form": "merged",
        "kind": ModelKind(task, ("input_ids", "attention_mask"), ("logits",)).record(),
    }
    (folder / f"{name}.config.json").write_text(json.dumps({"model_type": "bert", "peanut": own}))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `tasks` and `keys`, which the command runs in."""
    for name in ("mood", "topic"):
        write_task(tmp_path / "tasks", name)
    (tmp_path / "keys").write_text("a-key\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written(here: Path, run_here: Run) -> None:
    options = ["--replicas", "4", "--cpus-per-replica", "2", "--max-waiting", "9", "--api-key-file", "keys"]
    done = run_here("peanut-serve", "deploy", "--classify", "tasks", *options, "--max-body", "1MiB")
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load((here / "classifiers.yaml").read_text())
    tunables = {"loaded": 16, "most_waiting": 9, "batch_wait": 0.005}
    assert config == {
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "peanut-serve",
                "route_prefix": "/",
                "import_path": "peanut_serve.ray.classifiers.app:build",
                "args": {
                    "folders": [str(here / "tasks")],
                    "cpus": 2.0,
                    "key_file": str(here / "keys"),
                    "most_bytes": 1 << 20,
                },
                "deployments": [
                    {"name": "Classifier", "num_replicas": 4, "user_config": tunables},
                    {"name": "ClassifierFront", "user_config": {"most_waiting": 36}},
                ],
            }
        ],
    }
    ClassifierSettings.model_validate(config["applications"][0]["args"])


def test_the_example_is_what_is_written() -> None:
    example = yaml.safe_load((ROOT / "examples" / "fleet" / "classifiers.yaml").read_text())
    (application,) = example["applications"]
    classifier = application["deployments"][0]
    tunables = Tunables.model_validate(classifier["user_config"])
    settings = ClassifierSettings(**application["args"], replicas=classifier["num_replicas"], tunables=tunables)
    assert declaration(settings, **example["http_options"]) == example


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--precision", "int8"], "has mood in fp32, not in int8"),
        (["--api-key-file", "nothing"], "nothing cannot be read"),
        (["--keys", "nothing"], "nothing cannot be read"),
        (["--max-body", "much"], "much"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others; give --api-key-file"),
        (["--host", "0.0.0.0", "--local"], "--host 0.0.0.0 can be reached by others; give --api-key-file"),
        (["--classify", "copy"], "copy has a task mood, and so has another folder"),
        (["--classify", "empty"], "empty contains no ONNX export"),
        (["--classify", "writers"], "poems does text-generation, which is not served"),
    ],
)
def test_what_is_refused(here: Path, run_here: Run, options: list[str], told: str) -> None:
    write_task(here / "copy", "mood")
    write_task(here / "writers", "poems", "text-generation")
    (here / "empty").mkdir()
    done = run_here("peanut-serve", "deploy", "--classify", "tasks", *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert told in line
    assert not (here / "classifiers.yaml").exists()


def test_a_changed_file_is_refused(here: Path, run_here: Run) -> None:
    (here / "tasks" / "topic.onnx").write_bytes(b"another")
    done = run_here("peanut-serve", "deploy", "--classify=tasks")
    assert done.returncode == 1
    assert "topic.onnx is not the file that was written for topic" in done.stderr
