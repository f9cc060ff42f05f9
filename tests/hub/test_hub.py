"""Bases from the Hub, served by a server on loopback with the same routes. huggingface_hub reads HF_ENDPOINT
on import, so these tests run the command in a separate process."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.commands import run
from support.golden import VISION
from support.hub.server import COMMIT, Hub, hub_settings, merge_from
from support.tiny_models import Pair, edit_config

pytestmark = pytest.mark.slow  # commands that download over HTTP


@pytest.mark.parametrize("base", ["org/single", "org/sharded"])
def test_downloads_what_it_needs_once_and_works_offline(hub: Hub, pair: Pair, base: str) -> None:
    edit_config(pair.adapter, base_model_name_or_path=base)
    first = merge_from(hub, pair, base)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # quiet in pipes, downloads included
    wanted = {p.name for p in hub.models[base].iterdir()} - {"pytorch_model.bin", "model.onnx", "README.md"}
    assert set(hub.downloads) == wanted
    assert set(hub.downloads.values()) == {1}
    manifest = json.loads((pair.output / "peanut_manifest.json").read_text())
    assert (manifest["base"]["repo_id"], manifest["base"]["revision"]) == (base, COMMIT)
    assert f'base_model: "{base}"' in (pair.output / "README.md").read_text()
    second = merge_from(hub, pair, base, "--overwrite", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert second.returncode == 0, second.stderr
    assert set(hub.downloads.values()) == {1}


def test_a_revision(hub: Hub, pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="org/single")
    assert merge_from(hub, pair, "org/single", "--revision", "v1").returncode == 0
    refused = merge_from(hub, pair, "org/single", "--revision", "v2", "--overwrite")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "peanut-merge: org/single has no revision 'v2' on the Hub"


def test_another_hub_id_than_the_adapters_is_refused_unless_forced(hub: Hub, pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="org/other")
    refused = merge_from(hub, pair, "org/single")
    assert refused.returncode == 1
    assert (
        "the adapter was trained on org/other, the base is org/single; give that base, or --force-base"
        in refused.stderr
    )
    assert not pair.output.exists()
    assert merge_from(hub, pair, "org/single", "--force-base").returncode == 0


def test_private_gated_and_missing_models(hub: Hub, pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="org/single")
    hub.private["org/single"] = "hf_secret"
    refused = merge_from(hub, pair, "org/single")
    assert refused.returncode == 1
    assert (
        "no folder 'org/single' here and no such model on the Hub; check the name, or pass --token" in refused.stderr
    )
    assert merge_from(hub, pair, "org/single", "--token", "hf_secret").returncode == 0
    assert "hf_secret" not in (pair.output / "peanut_manifest.json").read_text()
    hub.gated.add("org/sharded")
    refused = merge_from(hub, pair, "org/sharded")
    assert "org/sharded is gated: accept its licence on the Hub" in refused.stderr
    refused = merge_from(hub, pair, "llama2-7b")
    assert "no folder 'meta-llama/Llama-2-7b-hf' here and no such model on the Hub" in refused.stderr
    for result in (refused,):
        assert result.returncode == 1
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_model_with_pickles_only(hub: Hub, pair: Pair) -> None:
    (pair.base / "model.safetensors").unlink()
    refused = merge_from(hub, pair, "org/single")
    assert refused.returncode == 1
    assert "expected safetensors weights" in refused.stderr
    assert "saved once with transformers' save_pretrained" in refused.stderr
    assert "pytorch_model.bin" not in hub.downloads


def test_the_revision_the_training_recorded_is_taken(hub: Hub, pair: Pair) -> None:
    edit_config(pair.adapter, base_model_name_or_path="org/single", revision="v9")
    refused = merge_from(hub, pair, "org/single")
    assert refused.stderr.strip() == "peanut-merge: org/single has no revision 'v9' on the Hub"
    assert merge_from(hub, pair, "org/single", "--revision", "main").returncode == 0
    edit_config(pair.adapter, revision="v1")
    assert merge_from(hub, pair, "org/single", "--overwrite").returncode == 0


def test_offline_with_a_cache_that_another_program_filled(hub: Hub, pair: Pair) -> None:
    """The cache may lack a companion that is not needed, but not the weights."""
    edit_config(pair.adapter, base_model_name_or_path="org/sharded")
    assert merge_from(hub, pair, "org/sharded").returncode == 0
    snapshot = next(pair.base.parent.glob(f"cache/**/snapshots/{COMMIT}"))
    (snapshot / "tokenizer.json").unlink()
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = merge_from(hub, pair, "org/sharded", "--overwrite", **offline)
    assert done.returncode == 0, done.stderr
    assert not (pair.output / "tokenizer.json").exists()
    next(snapshot.glob("model-*.safetensors")).unlink()
    refused = merge_from(hub, pair, "org/sharded", "--overwrite", **offline)
    assert refused.returncode == 1
    assert "neither complete in the local cache" in refused.stderr
    assert (pair.output / "config.json").exists()


def test_an_unreachable_hub(hub: Hub, pair: Pair) -> None:
    refused = merge_from(hub, pair, "org/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.returncode == 1
    assert "no folder 'org/single' here, and org/single is neither complete in the local cache nor" in refused.stderr
    assert "Traceback" not in refused.stderr


def merge_adapter(hub: Hub, pair: Pair, adapter: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--base", pair.base, "--adapter", adapter, "-o", pair.output, "--json", *options)
    return run("peanut-merge", *arguments, **hub_settings(hub, pair))


def test_an_adapter_from_the_hub(hub: Hub, pair: Pair) -> None:
    (pair.adapter / "optimizer.pt").write_bytes(b"x" * 100)
    hub.models["user/gsm8k"] = pair.adapter
    done = merge_adapter(hub, pair, "user/gsm8k", "--adapter-revision", "v1")
    assert done.returncode == 0, done.stderr
    assert set(hub.downloads) == {"adapter_config.json", "adapter_model.safetensors"}
    manifest = json.loads((pair.output / "peanut_manifest.json").read_text())["adapters"][0]
    assert (manifest["name"], manifest["repo_id"], manifest["revision"]) == ("gsm8k", "user/gsm8k", COMMIT)
    for options, message in (
        (["user/gsm8k", "--adapter-revision", "v2"], "user/gsm8k has no revision 'v2' on the Hub"),
        (["user/other"], "no folder 'user/other' here and no such model on the Hub"),
        ([str(pair.adapter), "--adapter-revision", "v1"], "--adapter-revision v1 has no meaning for the local path"),
        (["nowhere"], "nowhere does not exist; expected the folder of a trained adapter, its weights, or a Hub id"),
    ):
        refused = merge_adapter(hub, pair, *options, "--overwrite")
        assert (refused.returncode, message in refused.stderr) == (1, True), refused.stderr


def test_an_adapter_of_another_layout_from_the_hub(hub: Hub, pair: Pair, tmp_path: Path) -> None:
    """Its weights do not have a file name of PEFT: they are fetched if there are no others."""
    case = VISION / "vanilla_qv"
    (tmp_path / "repo").mkdir()
    shutil.copy(case / "theta.safetensors", tmp_path / "repo")
    shutil.copy(case / "labels.json", tmp_path / "repo")
    hub.models["user/pets"] = tmp_path / "repo"
    done = merge_adapter(hub, Pair(case / "base", pair.adapter, pair.output), "user/pets")
    assert done.returncode == 0, done.stderr
    assert json.loads((pair.output / "config.json").read_text())["id2label"]["4"] == "label_4"
    assert set(hub.downloads) == {"theta.safetensors", "labels.json"}


def test_the_base_of_a_hub_adapter_is_not_recorded_in_the_cache(hub: Hub, pair: Pair) -> None:
    hub.models["user/gsm8k"] = pair.adapter
    done = run("peanut-inspect", "user/gsm8k", "--base", pair.base, "--record-base", **hub_settings(hub, pair))
    assert "the base can only be recorded in a local adapter folder" in done.stderr
