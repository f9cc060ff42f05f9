"""Exports of really trained adapters: what they answer, and what is in their folders."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from support.commands import Run
from support.paths import DATA
from transformers import AutoConfig, AutoImageProcessor, ViTForImageClassification

from converters import merge
from converters.api.exporting import export_onnx
from converters.inference.adapter_file import model_version, read_adapter_file
from converters.inference.session import LoadedAdapter, Session
from converters.outputs.onnx.graphs import model_file, template_cache
from converters.outputs.onnx.plan import ExportOptions, Form

pytestmark = pytest.mark.slow  # traces a model in every form

BASE = DATA / "vit-tiny" / "base"
TASKS = ("digits5to9", "oddeven", "authors-digits5to9")
FOLDERS = [DATA / "vit-tiny" / task for task in TASKS]
LABELS = ["five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One task alone, and three in each of the forms that have several in a folder."""
    root = tmp_path_factory.mktemp("exported")
    export_onnx(BASE, FOLDERS[0], root / "merged", labels=LABELS)
    for form in (Form.SHARED, Form.SWAPPABLE, Form.SELF_MERGING):
        export_onnx(BASE, FOLDERS, root / form.value, each=True, options=ExportOptions(form=form))
    return {form.value: root / form.value for form in Form}


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Digits as the adapters' training saw them, float32 (n, 1, 16, 16), and which they are."""
    digits = load_digits()
    images = torch.tensor(digits.images[1400:] / 16, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", align_corners=False)
    return ((images - 0.5) / 0.5).numpy(), digits.target[1400:]


def answers(folder: Path, task: str, pixels: np.ndarray) -> np.ndarray:
    """Logits of a task in a folder of any form."""
    if (folder / f"{task}.onnx_adapter").exists():
        adapter = LoadedAdapter(folder / f"{task}.onnx_adapter")
        return Session(folder / "model.onnx").run({"pixel_values": pixels}, adapter)
    name = f"{task}.onnx" if (folder / f"{task}.onnx").exists() else "model.onnx"
    return Session(folder / name).run({"pixel_values": pixels})


def reference(task: str, pixels: np.ndarray, tmp_path: Path) -> np.ndarray:
    """PEFT's own forward pass; for the authors' layout, which PEFT does not read, the merged checkpoint's."""
    if task.startswith("authors"):
        merge(BASE, DATA / "vit-tiny" / task, tmp_path / "merged")
        model = ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    else:
        config = AutoConfig.from_pretrained(BASE, num_labels=2 if task == "oddeven" else 5)
        fresh = ViTForImageClassification.from_pretrained(BASE, config=config, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(fresh, DATA / "vit-tiny" / task).eval()
    with torch.inference_mode():
        return model(pixel_values=torch.from_numpy(pixels)).logits.numpy()


@pytest.mark.parametrize("task", TASKS)
def test_real_adapters_answer_as_in_torch(
    exported: dict[str, Path], held_out: tuple[np.ndarray, np.ndarray], task: str, tmp_path: Path
) -> None:
    pixels, digit = held_out
    wanted = reference(task, pixels, tmp_path)
    right, known = (digit % 2, digit >= 0) if task == "oddeven" else (digit - 5, digit >= 5)
    for form, folder in exported.items():
        if form == "merged" and task != TASKS[0]:
            continue
        found = answers(folder, task, pixels)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        assert (found.argmax(1) == wanted.argmax(1)).all(), form
        assert (found.argmax(1) == right)[known].mean() > 0.85


def test_a_folder_of_one_task(exported: dict[str, Path]) -> None:
    folder = exported["merged"]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.onnx", "peanut_manifest.json", "preprocessor_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == LABELS
    assert config["architectures"] == ["ViTForImageClassification"]
    model = onnx.load(folder / "model.onnx")
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    assert [value.name for value in model.graph.output] == ["logits"]
    dims = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (model.graph.input[0], model.graph.output[0])
    ]
    assert dims == [["batch_size", 1, 16, 16], ["batch_size", 5]]
    assert model.opset_import[0].version == 18
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["id2label"]) == {str(i): label for i, label in enumerate(LABELS)}
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 16
    manifest = json.loads((folder / "peanut_manifest.json").read_text())
    task = manifest["tasks"]["digits5to9"]
    assert task["verified"]["batch_sizes"] == [1, 2, 5]
    assert task["verified"]["largest_difference"] <= task["verified"]["tolerance"]
    assert task["verified"]["agreement"] == 1
    assert "pipeline_tag: image-classification" in (folder / "README.md").read_text()


def test_names_are_those_of_transformers(exported: dict[str, Path]) -> None:
    model = onnx.load(exported["merged"] / "model.onnx")
    names = {tensor.name for tensor in model.graph.initializer}
    wanted = set(ViTForImageClassification.from_pretrained(BASE).state_dict())
    assert wanted <= names


def test_nothing_local_is_in_any_file(exported: dict[str, Path]) -> None:
    told = [
        os.fsencode(path) for path in (BASE, Path.home(), Path(torch.__file__).parent, Path.cwd(), exported["merged"])
    ]
    for folder in exported.values():
        for path in (path for path in folder.iterdir() if path.is_file()):
            content = path.read_bytes()
            assert not any(local in content for local in told), path
            if path.suffix == ".onnx":
                assert b".py" not in content
                assert b"Traceback" not in content


def test_sharing_adds_only_what_a_task_changes(exported: dict[str, Path]) -> None:
    folder = exported["shared"]
    square, head = 192 * 192 * 4, 5 * 192 * 4 + 5 * 4
    assert (folder / "digits5to9.onnx_data").stat().st_size == pytest.approx(12 * square + head, abs=4096 * 13)
    model = onnx.load(folder / "digits5to9.onnx", load_external_data=False)
    places = {
        tensor.name: tensor.external_data[0].value for tensor in model.graph.initializer if tensor.external_data
    }
    own = {name for name, place in places.items() if place == "digits5to9.onnx_data"}
    targets = {f"vit.layers.{i}.attention.{module}.weight" for i in range(6) for module in ("q_proj", "v_proj")}
    assert own == targets | {"classifier.weight", "classifier.bias"}
    assert set(places.values()) == {"digits5to9.onnx_data", "base.onnx_data"}
    assert all(Path(place).name == place for place in places.values())


def test_theta_is_all_a_self_merging_task_adds(exported: dict[str, Path]) -> None:
    theta = 12 * 2 * 8 * 192 * 4  # A and B of q and v in six layers
    head = (5 * 192 + 5) * 4
    size = (exported["self-merging"] / "digits5to9.onnx").stat().st_size
    assert size < theta + head + 60_000
    assert not (exported["self-merging"] / "digits5to9.onnx_data").exists()


def test_without_an_adapter_a_swappable_graph_answers_nan(
    exported: dict[str, Path], held_out: tuple[np.ndarray, np.ndarray]
) -> None:
    """Its base knows no such labels; ONNX Runtime forgets adapters in silence when inputs are bound."""
    session = Session(exported["swappable"] / "model.onnx")
    assert np.isnan(session.run({"pixel_values": held_out[0][:2]})).all()


def test_adapter_files_tell_their_base(exported: dict[str, Path]) -> None:
    manifest = json.loads((exported["swappable"] / "peanut_manifest.json").read_text())
    fingerprint = manifest["base"]["fingerprint"]
    file = exported["swappable"] / "oddeven.onnx_adapter"
    assert read_adapter_file(file)[0] == model_version(fingerprint)
    assert Session(exported["swappable"] / "model.onnx").metadata["peanut.base"] == fingerprint
    assert model_version(fingerprint) != model_version(fingerprint + "0")


def test_the_same_export_gives_the_same_bytes(exported: dict[str, Path], tmp_path: Path) -> None:
    export_onnx(BASE, FOLDERS, tmp_path / "again", each=True, options=ExportOptions(form=Form.SELF_MERGING))
    for path in exported["self-merging"].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow  # it traces three times
def test_one_trace_serves_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_cache, "cache_folder", lambda: tmp_path / "cache")
    traced = []
    trace = template_cache.trace
    monkeypatch.setattr(template_cache, "trace", lambda *given: traced.append(given) or trace(*given))
    export_onnx(BASE, FOLDERS[0], tmp_path / "one")
    assert len(traced) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    export_onnx(BASE, FOLDERS, tmp_path / "each", each=True)
    assert len(traced) == 1
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])  # damaged
    export_onnx(BASE, FOLDERS[1], tmp_path / "two")
    assert len(traced) == 2
    same = (tmp_path / "each" / "oddeven" / "model.onnx").read_bytes()
    assert (tmp_path / "two" / "model.onnx").read_bytes() == same
    export_onnx(BASE, FOLDERS[1], tmp_path / "newer", options=ExportOptions(opset=20))
    assert len(traced) == 3
    assert onnx.load(tmp_path / "newer" / "model.onnx").opset_import[0].version == 20


def test_what_the_command_says(tmp_path: Path, run_here: Run) -> None:
    command = ("peanut-merge", "--base", BASE, "--adapter", FOLDERS[0], "--format", "onnx", "-o", tmp_path / "out")
    planned = run_here(*command, "--dry-run", "--json")
    assert json.loads(planned.stdout)["outputs"][0]["tasks"] == ["digits5to9"]
    assert not (tmp_path / "out").exists()
    done = run_here(*command, "--quantize", "fp16")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path}/out: model.onnx, model_fp16.onnx, 16.")
    assert "8 inputs (0 real) in batches of 1, 2, 5: largest difference from torch" in second
    assert second.endswith("top-1 agreement 100.00%")
    assert third.startswith("  fp16: 37 of 37 linear layers, 5.")


def test_for_transformers_js(tmp_path: Path) -> None:
    export_onnx(BASE, FOLDERS[0], tmp_path / "web", options=ExportOptions(transformersjs=True))
    assert (tmp_path / "web" / "onnx" / "model.onnx").is_file()
    assert not (tmp_path / "web" / "model.onnx").exists()
    assert (tmp_path / "web" / "config.json").is_file()
    assert (tmp_path / "web" / "preprocessor_config.json").is_file()


def test_weights_lie_beside_a_graph_that_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: tuple[np.ndarray, np.ndarray]
) -> None:
    monkeypatch.setattr(model_file, "SINGLE_FILE_BYTES", 1_000_000)
    export_onnx(BASE, FOLDERS[0], tmp_path / "large")
    assert (tmp_path / "large" / "model.onnx").stat().st_size < 200_000
    assert (tmp_path / "large" / "model.onnx_data").stat().st_size > 10_000_000
    export_onnx(BASE, FOLDERS[0], tmp_path / "swappable", options=ExportOptions(form=Form.SWAPPABLE))
    assert (tmp_path / "swappable" / "model.onnx_data").stat().st_size > 10_000_000
    wanted = reference(TASKS[0], held_out[0][:8], tmp_path)
    for form in ("large", "swappable"):
        np.testing.assert_allclose(answers(tmp_path / form, TASKS[0], held_out[0][:8]), wanted, atol=1e-4)
