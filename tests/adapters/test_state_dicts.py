"""State dicts of the authors' vision and GLUE code: whole models, Trainer folders, heads, labels, scales."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from support.golden import GLUE, VISION, Golden
from support.paths import DATA
from support.tiny_models import edit_json, edit_weights

from converters import load_adapter, merge, prepare_merge
from converters.errors import BaseMismatchError, CheckpointError, OptionError, PeanutError, TargetError, ThetaError

CASE = Golden(VISION / "multilayer_depth6_qv", "full_state_dict.bin")
SMALL = Golden(GLUE / "peanut_s_scale0.01", "theta.safetensors")


def trainer_folder(case: Golden, folder: Path) -> Path:
    """What a Trainer saves of an adapted model: model.safetensors and the config of its class."""
    folder.mkdir()
    state = torch.load(case.folder / "full_state_dict.bin", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    glue = "authors-nlu" in str(case.folder)
    config = json.loads((case.base / "config.json").read_text())
    classes = ["RobertaForSequenceClassification" if glue else "ViTForImageClassification"]
    size = state["classifier.out_proj.bias" if glue else "classifier.bias"].shape[0]
    labels = {str(i): f"class {i}" for i in range(size)}
    config |= {"architectures": classes, "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"state of the trainer")
    return folder


@pytest.mark.parametrize("case", [CASE, SMALL], ids=lambda case: case.name)
def test_a_trainers_folder_is_adapter_and_base_at_once(case: Golden, tmp_path: Path) -> None:
    run = trainer_folder(case, tmp_path / "run")
    result = merge("self", run, tmp_path / "own", **case.options)
    found, wanted = case.logits(tmp_path / "own")
    assert (found - wanted).abs().max() <= 1e-5
    assert result.plan.config["id2label"]["1"] == "class 1"
    merge(case.base, run, tmp_path / "given", **case.options)
    found, wanted = case.logits(tmp_path / "given")
    assert (found - wanted).abs().max() <= 1e-5


def test_base_self_from_a_pickle_with_a_config_beside_it(tmp_path: Path) -> None:
    shutil.copy(CASE.adapter, tmp_path / "pets.bin")
    shutil.copy(CASE.base / "config.json", tmp_path)
    plan = prepare_merge("self", tmp_path / "pets.bin", labels=list("abcde"))
    assert plan.default_output == Path("pets-merged")
    merge("self", tmp_path / "pets.bin", tmp_path / "merged", labels=list("abcde"))
    found, wanted = CASE.logits(tmp_path / "merged")
    assert (found - wanted).abs().max() <= 1e-5


def test_base_self_without_a_base(tmp_path: Path) -> None:
    shutil.copy(CASE.adapter, tmp_path / "pets.bin")
    with pytest.raises(CheckpointError, match=r"base='self': no config.json next to .*pets.bin; copy the base's"):
        prepare_merge("self", tmp_path / "pets.bin")
    with pytest.raises(OptionError, match=r"theta.bin contains θ only and no base weights; give the base"):
        prepare_merge("self", CASE.folder / "theta.bin")


@pytest.mark.slow
def test_base_self_without_room_for_it(tmp_path: Path) -> None:
    shutil.copy(CASE.adapter, tmp_path / "pets.bin")
    shutil.copy(CASE.base / "config.json", tmp_path)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [Path(sys.executable).parent / "peanut-merge", "--base", "self", "--adapter", tmp_path / "pets.bin"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)),
    )
    assert done.returncode == 1
    assert "the base weights could not be written to" in done.stderr
    assert "point TMPDIR to a disk with enough space" in done.stderr
    assert not list((tmp_path / "tmp").glob("peanut-base-*"))


def test_a_folder_called_self_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CASE.base, tmp_path / "self")
    monkeypatch.chdir(tmp_path)
    assert prepare_merge("self", CASE.folder / "theta.bin").base.holder is None


def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    other = VISION / "vanilla_qv" / "base"
    with pytest.raises(
        BaseMismatchError, match=r"of the \d+ base weights saved in .* this is not the base .* base='self'"
    ):
        merge(other, CASE.adapter, tmp_path / "merged")
    notes = prepare_merge(other, CASE.adapter, force_base=True).notes
    assert any(note.startswith("forced:") for note in notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_another_dtype_is_the_same_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = Path(shutil.copytree(CASE.base, tmp_path / "base"))
    edit_weights(base / "model.safetensors", lambda w: {n: t.to(dtype) for n, t in w.items()})
    prepare_merge(base, CASE.adapter)
    edit_weights(base / "model.safetensors", lambda w: w["layernorm.bias"].add_(0.01))
    with pytest.raises(BaseMismatchError, match=r"1 of the 38 .*vit.layernorm.bias"):
        prepare_merge(base, CASE.adapter)


def test_a_base_that_lacks_what_was_saved_along(tmp_path: Path) -> None:
    base = Path(shutil.copytree(CASE.base, tmp_path / "base"))
    edit_weights(base / "model.safetensors", lambda w: w.pop("layernorm.bias"))
    with pytest.raises(TargetError, match=r"vit.layernorm.bias has no matching tensor in the base"):
        prepare_merge(base, CASE.adapter)


def test_labels_given_recorded_or_in_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    theta = Path(shutil.copy(CASE.folder / "theta.safetensors", folder))

    def first_label(adapter: Path, **options: object) -> str:
        return prepare_merge(CASE.base, adapter, **options).config["id2label"]["0"]

    assert first_label(folder) == "LABEL_0"
    shutil.copy(CASE.folder / "labels.json", folder)
    assert first_label(folder) == "label_0"
    assert first_label(folder, labels=list("vwxyz")) == "v"
    assert first_label(theta) == "LABEL_0"  # a labels.json beside a file may be of another one
    edit_json(Path(shutil.copy(CASE.base / "config.json", folder)), id2label={str(i): f"is {i}" for i in range(5)})
    assert first_label(theta) == "is 0"
    (folder / "labels.json").write_text('["one", "two"]')
    with pytest.raises(OptionError, match="2 labels were recorded with .* head has 5 outputs; pass labels="):
        prepare_merge(CASE.base, folder)


def test_the_scale_of_the_glue_code_has_to_be_given() -> None:
    with pytest.raises(OptionError, match=r"does not save the scale s: give scaling=, .*\(0.01, 0.1 or 1.0"):
        load_adapter(SMALL.adapter)
    one, two = (load_adapter(SMALL.adapter, scaling=s) for s in (0.01, 0.1))
    assert one.digest != two.digest


def test_the_scale_of_the_vision_code_is_one_unless_given() -> None:
    theta = CASE.folder / "theta.bin"
    assert {t.settings["scaling"] for t in load_adapter(theta).modules.values()} == {1.0}
    assert {t.settings["scaling"] for t in load_adapter(theta, scaling=0.5).modules.values()} == {0.5}


def glue_theta(layers: list[int], count: int, folder: Path) -> tuple[Path, Path]:
    """(a RoBERTa of `count` layers, θ of the GLUE code on some of them)."""
    config = tf.RobertaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=count, num_attention_heads=2, vocab_size=30,
        max_position_embeddings=12, num_labels=2,
    )  # fmt: skip
    tf.RobertaModel(config).save_pretrained(folder / "base")
    save_file(
        {
            f"roberta.encoder.layer.{i}.attention.self.{kind}_adapter.{part}.weight": torch.randn(shape)
            for i in layers
            for kind in "qv"
            for part, shape in (("A", (1, 16)), ("B", (16, 1)))
        },
        folder / "theta.safetensors",
    )
    return folder / "base", folder / "theta.safetensors"


# what the authors' set_peanut_s adapts: layers with 4 to 11 somewhere in their number
LARGE = [4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize(("layers", "count"), [
    (list(range(12)), 12), (list(range(4, 12)), 12), ([4, 5], 6), (list(range(24)), 24), (LARGE, 24),
])  # fmt: skip
def test_the_layers_that_peanut_s_and_peanut_l_adapt(tmp_path: Path, layers: list[int], count: int) -> None:
    base, theta = glue_theta(layers, count, tmp_path)
    plan = prepare_merge(base, theta, scaling=0.1)
    assert sum(len(tensor.terms) for tensor in plan.tensors) == 2 * len(layers)


@pytest.mark.parametrize(("layers", "count", "message"), [
    ([0, 1, 3], 4, r"layer.2.attention.self.query and 1 more should have θ like the rest"),
    ([0, 1, 2], 4, r"layer.3.attention.self.query and 1 more should have θ"),
    ([4, 5, 7], 8, r"layer.6.attention.self.query and 1 more should have θ"),
    ([4, 5, 6], 8, r"layer.7.attention.self.query and 1 more should have θ"),
    ([2, 3, 4, 5], 6, r"layer 2 has θ and layer 0 has none; .* so the adapter is incomplete"),
])  # fmt: skip
def test_a_missing_layer_is_refused(tmp_path: Path, layers: list[int], count: int, message: str) -> None:
    base, theta = glue_theta(layers, count, tmp_path)
    with pytest.raises(ThetaError, match=message):
        prepare_merge(base, theta, scaling=0.1)


def test_r_and_depth_are_read_per_module() -> None:
    """Really trained with the authors' code: depth 6 on attention means depth 4 on the dense layers there."""
    adapter = load_adapter(DATA / "vit-tiny" / "authors-digits5to9")
    depths = {module.rsplit(".", 1)[-1]: adapter.describe(module).facts["depth"] for module in adapter.modules}
    assert depths == {"query": 2, "value": 2, "dense": 1}


def test_a_really_trained_adapter_of_the_authors_code_classifies(tmp_path: Path) -> None:
    merge(DATA / "vit-tiny" / "base", DATA / "vit-tiny" / "authors-digits5to9", tmp_path / "merged")
    digits = load_digits()
    kept = digits.target >= 5
    images = torch.tensor(digits.images[kept], dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", align_corners=False)
    model = tf.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = model((images - 0.5) / 0.5).logits.argmax(1)
    assert (found == torch.tensor(digits.target[kept] - 5)).double().mean() >= 0.85


def test_theta_of_a_headless_model(tmp_path: Path) -> None:
    theta = {
        name.removeprefix("vit."): tensor
        for name, tensor in load_file(CASE.folder / "theta.safetensors").items()
        if not name.startswith("classifier")
    }
    save_file(theta, tmp_path / "theta.safetensors")
    result = merge(CASE.base, tmp_path / "theta.safetensors", tmp_path / "merged")
    assert result.plan.config["architectures"] == ["ViTModel"]
    base, merged = (load_file(f / "model.safetensors") for f in (CASE.base, tmp_path / "merged"))
    for name, delta in CASE.deltas.items():
        short = name.removeprefix("vit.")
        assert (merged[short] - base[short] - delta).norm() <= 1e-5 * delta.norm()


def test_a_damaged_config_beside_it(tmp_path: Path) -> None:
    theta = Path(shutil.copy(CASE.folder / "theta.safetensors", tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PeanutError, match="cannot read the model config"):
        load_adapter(theta)
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", architectures="ViT", id2label=[1])
    load_adapter(theta)
