"""`--format peft`: an HF PEFT adapter from the authors' files, where a PeanutConfig can say it."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeanutConfig
from safetensors.torch import load_file
from support.commands import Run
from support.golden import CASES, LLM, VISION, Golden
from support.native_variants import MODULE, variants
from support.paths import DATA
from support.peft_oracle import logits_in_peft
from support.tiny_models import Pair

from converters import Weighted, load_adapter, merge, prepare_merge, save_adapter
from converters.errors import ConversionError, OutputExistsError
from converters.outputs.peft import plan_peft_adapter, write_peft_adapter

CONVERTIBLE = [c for c in CASES if c.folder.parent.name != "authors-llm"]
CASE = Golden(VISION / "multilayer_depth6_qv", "theta.safetensors")


def convert(base: Path, adapter: object, output: Path, **options: object) -> Path:
    return write_peft_adapter(plan_peft_adapter(prepare_merge(base, adapter, **options), output))


@pytest.mark.parametrize("case", CONVERTIBLE, ids=lambda case: case.name)
def test_peft_computes_what_the_authors_code_computes(case: Golden, tmp_path: Path) -> None:
    convert(case.base, case.adapter, tmp_path / "peft", **case.options)
    config = PeanutConfig.from_pretrained(tmp_path / "peft")
    depth = int(case.folder.name.split("depth")[1][0]) if "depth" in case.folder.name else 2
    assert config.depth == (depth - 2) // 2
    found, expected = logits_in_peft(case, tmp_path / "peft")
    assert (found - expected).abs().max() <= 1e-5


def test_the_converted_adapter_merges_to_the_same_weights(tmp_path: Path) -> None:
    convert(CASE.base, CASE.folder / "full_state_dict.bin", tmp_path / "peft", labels=list("vwxyz"))
    adapter = load_adapter(tmp_path / "peft")
    assert (adapter.layout, adapter.labels) == ("hf-peft", tuple("vwxyz"))
    assert adapter.base_fingerprint is not None
    merge(CASE.base, CASE.adapter, tmp_path / "one")
    merge(CASE.base, tmp_path / "peft", tmp_path / "two")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_weight_goes_into_the_scaling(tmp_path: Path) -> None:
    convert(CASE.base, Weighted(load_adapter(CASE.adapter), 0.25), tmp_path / "peft")
    assert PeanutConfig.from_pretrained(tmp_path / "peft").scaling == 0.25


def test_the_command(tmp_path: Path, run_here: Run) -> None:
    command = ["peanut-merge", "--format", "peft", "--base", CASE.base, "--adapter", CASE.adapter]
    done = run_here(*command, "-o", tmp_path / "peft", "--dry-run")
    assert "would write" in done.stdout
    assert not (tmp_path / "peft").exists()
    done = run_here(*command, "-o", tmp_path / "peft", "--json")
    assert json.loads(done.stdout)["modules_to_save"] == ["classifier"]
    done = run_here(*command, "-o", tmp_path / "peft", "--overwrite")
    assert "an HF PEFT adapter, r = 7, depth = 2, act_fn = relu, scaling = 1.0" in done.stdout
    assert "4 modules, whole: classifier" in done.stdout
    done = run_here(*command, "-o", tmp_path / "peft")
    assert (done.returncode, "exists" in done.stderr) == (1, True)
    done = run_here(*command, "--format", "gguf")
    assert "--format gguf is unknown; expected merged, onnx, lora or peft" in done.stderr


def test_auto_classes_of_peft_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto_mapping names the class; the base is found under the name the config has."""
    monkeypatch.chdir(CASE.base.parent)
    convert(CASE.base, CASE.adapter, tmp_path / "peft", labels=list("vwxyz"))
    model = AutoPeftModel.from_pretrained(tmp_path / "peft", num_labels=5)
    assert type(model.base_model.model).__name__ == "ViTForImageClassification"


def refused(base: Path, adapter: object, folder: Path) -> str:
    with pytest.raises(ConversionError) as error:
        convert(base, adapter, folder / "peft")
    assert not (folder / "peft").exists()
    return str(error.value)


def test_what_a_config_cannot_say(pair: Pair, tmp_path: Path) -> None:
    message = refused(LLM / "square" / "base", LLM / "square" / "adapter", tmp_path)
    assert "its orientation is rows, PEFT knows columns only; merge it" in message
    real = DATA / "vit-tiny" / "authors-digits5to9"
    message = refused(DATA / "vit-tiny" / "base", real, tmp_path)
    assert "a PeanutConfig has one depth for all modules, this adapter has 1, 2; merge it" in message
    message = refused(pair.base, [pair.adapter, pair.adapter], tmp_path)
    assert "cannot hold the sum of several" in message
    for name, reason in {
        "sine on the output, columns": "an activation on the output",
        "deep without residuals": "its hidden layers have no residuals",
        "lora": "its orientation is free",
    }.items():
        save_adapter(tmp_path / name, {MODULE: variants()[name][0]})
        assert reason in refused(pair.base, tmp_path / name, tmp_path)


def test_two_ranks(pair: Pair, tmp_path: Path) -> None:
    adapter = load_adapter(pair.adapter)
    tweakers = {m: adapter.tweaker(m) for m in adapter.modules}
    first = next(iter(tweakers))
    small = tweakers[first]
    tweakers[first] = type(small)(small.orientation, small.a[:2].clone(), small.b[:, :2].clone(), scaling=0.5)
    save_adapter(tmp_path / "mixed", tweakers)
    assert "one r for all modules, this adapter has 2, 4" in refused(pair.base, tmp_path / "mixed", tmp_path)


def test_a_part_of_a_head(tmp_path: Path) -> None:
    adapter = load_adapter(CASE.adapter)
    tweakers = {m: adapter.tweaker(m) for m in adapter.modules}
    saved = {"classifier.weight": adapter.saved_tensor("classifier.weight")}
    base = tmp_path / "base"
    merge(CASE.base, CASE.adapter, base)  # a base with a head
    (base / "peanut_manifest.json").unlink()
    save_adapter(tmp_path / "half", tweakers, saved=saved, task_type="IMAGE_CLS")
    assert "PEFT saves modules whole" in refused(base, tmp_path / "half", tmp_path)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        convert(CASE.base, CASE.adapter, tmp_path / "peft")
    assert [p.name for p in (tmp_path / "peft").iterdir()] == ["mine.txt"]
