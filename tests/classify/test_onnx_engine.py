"""The ONNX engine and `peanut-serve predict` on exported folders: predictions, swaps and errors."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.commands import Run
from support.companions.preprocessor_folders import text_model
from support.paths import DATA
from support.tiny_models import Pair, edit_json
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from converters.api.exporting import export_onnx
from converters.errors import BaseMismatchError, CheckpointError, OptionError, PeanutError, VerificationError
from converters.inference.adapter_file import write_adapter_file
from converters.outputs.onnx.plan import ExportOptions, Form
from peanut_serve.classify.engine import OnnxEngine

pytestmark = pytest.mark.slow  # runs exports in every form

VIT = DATA / "vit-tiny"
TASKS = ("digits5to9", "oddeven")
LABELS = {"digits5to9": ["5", "6", "7", "8", "9"], "oddeven": ["even", "odd"]}


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixty images of the digits 5 to 9; file names begin with the digit."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    chosen = [index for index in range(1500, 1797) if digits.target[index] >= 5][:60]
    files = [folder / f"{digits.target[index]}-{index}.png" for index in chosen]
    for index, file in zip(chosen, files, strict=True):
        Image.fromarray(digits.images[index].astype(np.uint8)).save(file)  # 0 to 16, as its preprocessor expects
    return files


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for task in TASKS:
        shutil.copytree(VIT / task, folder / task)
        (folder / task / "labels.json").write_text(json.dumps(LABELS[task]))
    return [folder / task for task in TASKS]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, adapters: list[Path]) -> dict[Form, Path]:
    root = tmp_path_factory.mktemp("exports")
    export_onnx(VIT / "base", adapters[0], root / "merged", options=ExportOptions(quantize=("int8",)))
    for form in (Form.SHARED, Form.SWAPPABLE, Form.SELF_MERGING):
        export_onnx(VIT / "base", adapters, root / form.value, each=True, options=ExportOptions(form=form))
    return {form: root / form.value for form in Form}


@pytest.fixture
def folders(originals: dict[Form, Path], tmp_path: Path) -> dict[Form, Path]:
    """Copies that tests can damage."""
    return {form: shutil.copytree(folder, tmp_path / folder.name) for form, folder in originals.items()}


@pytest.mark.parametrize("form", [Form.SHARED, Form.SWAPPABLE, Form.SELF_MERGING])
def test_every_form_predicts(originals: dict[Form, Path], form: Form, digit_files: list[Path]) -> None:
    engine = OnnxEngine(originals[form], threads=1)
    assert list(engine.tasks) == list(TASKS)
    digits = [one[0].label for one in engine.predict(digit_files, "digits5to9")]
    kinds = [one[0].label for one in engine.predict(digit_files, "oddeven", top_k=1)]
    assert np.mean([found == file.name[0] for found, file in zip(digits, digit_files, strict=True)]) > 0.85
    assert np.mean([("odd" in k) == bool(int(f.name[0]) % 2) for k, f in zip(kinds, digit_files, strict=True)]) > 0.8
    for best in engine.predict(digit_files[:3], "digits5to9", top_k=9):
        assert sum(one.score for one in best) == pytest.approx(1)
        assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)


def test_one_session_serves_all_swappable_tasks_at_once(originals: dict[Form, Path]) -> None:
    engine = OnnxEngine(originals[Form.SWAPPABLE], threads=1)
    pixels = np.random.default_rng(0).standard_normal((4, 1, 16, 16), np.float32)
    wanted = {
        task: OnnxEngine(originals[Form.SHARED], threads=1).run({"pixel_values": pixels}, task) for task in TASKS
    }

    def ask(index: int) -> bool:
        task = TASKS[index % 2]
        found = engine.run({"pixel_values": pixels}, task)
        return found.shape == wanted[task].shape and bool(np.allclose(found, wanted[task], atol=1e-4))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))
    assert engine.load("oddeven").session is engine.load("digits5to9").session


def test_the_command(originals: dict[Form, Path], digit_files: list[Path], run_here: Run) -> None:
    done = run_here("peanut-serve", "predict", originals[Form.MERGED], *digit_files[:20], "--json", "--top-k", "2")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [one["input"] for one in answers] == [str(file) for file in digit_files[:20]]
    assert all(len(one["predictions"]) == 2 for one in answers)
    right = [one["predictions"][0]["label"] == Path(one["input"]).name[0] for one in answers]
    assert np.mean(right) > 0.8
    done = run_here("peanut-serve", "predict", originals[Form.MERGED], digit_files[0], "--precision", "int8")
    assert "score" in done.stdout
    done = run_here("peanut-serve", "predict", originals[Form.MERGED])
    assert done.returncode == 1
    assert (
        done.stderr
        == "peanut-serve predict: nothing to predict; give image files, sound files, texts, or --text-file\n"
    )


def test_texts(make_pair: Callable[..., Pair], tmp_path: Path, run_here: Run) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(**sizes, vocab_size=96, num_labels=1)
    targets = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    pair = make_pair(BertForSequenceClassification(config), **targets)
    text_model(pair.base)
    export_onnx(pair.base, pair.adapter, pair.output, labels=["similarity"])
    (tmp_path / "texts.txt").write_text("good film\n\nbad\n")
    done = run_here("peanut-serve", "predict", pair.output, "film", "--text-file", tmp_path / "texts.txt", "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [one["input"] for one in answers] == ["film", "good film", "bad"]
    engine = OnnxEngine(pair.output)
    for answer in answers:
        (alone,) = engine.predict([answer["input"]])
        assert answer["predictions"] == [{"label": "similarity", "score": pytest.approx(alone[0].score, abs=1e-6)}]


def test_several_labels_at_once(folders: dict[Form, Path], digit_files: list[Path]) -> None:
    edit_json(folders[Form.MERGED] / "config.json", problem_type="multi_label_classification")
    engine = OnnxEngine(folders[Form.MERGED])
    (found,) = engine.predict(digit_files[:1])
    pixels = engine._preprocessor(engine.find(None))(digit_files[:1])
    wanted = torch.sigmoid(torch.from_numpy(engine.run(pixels)))[0].sort(descending=True).values
    assert [one.score for one in found] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_a_token_classifier_has_no_single_label(make_pair: Callable[..., Pair]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForTokenClassification(BertConfig(**sizes, vocab_size=96, num_labels=3))
    pair = make_pair(model, target_modules=["query"], modules_to_save=["classifier"])
    export_onnx(pair.base, pair.adapter, pair.output)
    engine = OnnxEngine(pair.output)
    with pytest.raises(OptionError, match=r"does token-classification, .* use entities\(\) for token classifiers"):
        engine.predict(["film"])
    ids = np.ones((2, 3), np.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0}
    assert engine.run(inputs).shape == (2, 3, 3)


def test_an_image_classifier_has_no_entities(folders: dict[Form, Path]) -> None:
    with pytest.raises(OptionError, match="does image-classification, which has no labels for parts of a text"):
        OnnxEngine(folders[Form.MERGED]).entities(["film"])


def refused(
    folder: Path, error: type[PeanutError], message: str, task: str | None = None, precision: str = "fp32"
) -> None:
    with pytest.raises(error, match=message):
        OnnxEngine(folder, precision=precision).run({"pixel_values": np.zeros((1, 1, 16, 16), np.float32)}, task)


def test_unknown_names(folders: dict[Form, Path], tmp_path: Path) -> None:
    refused(folders[Form.SHARED], OptionError, "has no task cars; available: digits5to9, oddeven", "cars")
    refused(folders[Form.SHARED], OptionError, "several tasks; choose one: digits5to9, oddeven")
    refused(folders[Form.MERGED], OptionError, "in fp32, int8, not in fp16", precision="fp16")
    refused(tmp_path, CheckpointError, "contains no ONNX export")


def test_replaced_files(folders: dict[Form, Path]) -> None:
    swappable, shared = folders[Form.SWAPPABLE], folders[Form.SHARED]
    shutil.copy(swappable / "oddeven.onnx_adapter", swappable / "digits5to9.onnx_adapter")
    refused(swappable, VerificationError, r"digits5to9\.onnx_adapter is not the file that was written", "digits5to9")
    with (shared / "base.onnx_data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\1")
    refused(shared, VerificationError, r"base\.onnx_data is not the file", "oddeven")
    engine = OnnxEngine(folders[Form.SELF_MERGING], threads=1)
    engine.load("digits5to9")
    shutil.copy(folders[Form.SELF_MERGING] / "oddeven.onnx", folders[Form.SELF_MERGING] / "digits5to9.onnx")
    engine.load("digits5to9")
    engine.unload("digits5to9")
    with pytest.raises(VerificationError, match=r"digits5to9\.onnx is not the file"):
        engine.load("digits5to9")
    (folders[Form.SELF_MERGING] / "oddeven.onnx").unlink()
    refused(folders[Form.SELF_MERGING], CheckpointError, r"oddeven\.onnx of oddeven is missing", "oddeven")


def set_own(folder: Path, task: str, **changes: object) -> None:
    """Change the `peanut` section of a task's config."""
    file = folder / f"{task}.config.json"
    edit_json(file, peanut={**json.loads(file.read_text())["peanut"], **changes})


def test_another_base(folders: dict[Form, Path]) -> None:
    """A task that was copied into a folder for another base."""
    swappable = folders[Form.SWAPPABLE]
    set_own(swappable, "oddeven", base="another")
    refused(
        swappable, BaseMismatchError, "oddeven was trained on the base another, but the graph contains", "oddeven"
    )
    original = json.loads((swappable / "digits5to9.config.json").read_text())["peanut"]["base"]
    write_adapter_file(swappable / "oddeven.onnx_adapter", {"classifier.bias": torch.zeros(2)}, "another")
    set_own(swappable, "oddeven", base=original, files={})
    refused(swappable, BaseMismatchError, "oddeven.onnx_adapter is for another base", "oddeven")


def test_an_adapter_of_another_graph(folders: dict[Form, Path]) -> None:
    swappable = folders[Form.SWAPPABLE]
    base = json.loads((swappable / "oddeven.config.json").read_text())["peanut"]["base"]
    write_adapter_file(swappable / "oddeven.onnx_adapter", {"vit.elsewhere": torch.zeros(2)}, base)
    set_own(swappable, "oddeven", files={})
    refused(swappable, CheckpointError, r"the graph has no input vit\.elsewhere", "oddeven")


def test_a_task_of_another_export_can_be_added(
    folders: dict[Form, Path], adapters: list[Path], tmp_path: Path
) -> None:
    """If it has the same base, and the graph has its modules."""
    export_onnx(VIT / "base", adapters[0], tmp_path / "later", options=ExportOptions(form=Form.SWAPPABLE))
    swappable = folders[Form.SWAPPABLE]
    for name in ("onnx_adapter", "config.json"):
        (swappable / f"digits5to9.{name}").unlink()
        shutil.copy(tmp_path / "later" / f"digits5to9.{name}", swappable / f"new.{name}")
    set_own(swappable, "new", adapter="new.onnx_adapter", files={})
    inputs = {"pixel_values": np.random.default_rng(1).standard_normal((2, 1, 16, 16), np.float32)}
    wanted = OnnxEngine(folders[Form.MERGED]).run(inputs)
    np.testing.assert_allclose(OnnxEngine(swappable).run(inputs, "new"), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["../merged/model.onnx", "/etc/passwd", "link.onnx"])
def test_files_outside_of_the_folder(folders: dict[Form, Path], name: str) -> None:
    (folders[Form.SHARED] / "link.onnx").symlink_to(folders[Form.MERGED] / "model.onnx")
    set_own(folders[Form.SHARED], "oddeven", models={"fp32": name}, files={})
    refused(folders[Form.SHARED], CheckpointError, "which is not in the folder", "oddeven")


def test_a_damaged_config(folders: dict[Form, Path]) -> None:
    set_own(folders[Form.SHARED], "oddeven", models=None)
    refused(folders[Form.SHARED], CheckpointError, "its section 'peanut' is damaged")


def test_invalid_logits(folders: dict[Form, Path], digit_files: list[Path]) -> None:
    """A graph without its adapter, and a config with other labels."""
    set_own(folders[Form.SWAPPABLE], "oddeven", form="merged", adapter=None, files={})
    with pytest.raises(VerificationError, match="oddeven: the graph returned NaN"):
        OnnxEngine(folders[Form.SWAPPABLE]).predict(digit_files[:1], "oddeven")
    edit_json(folders[Form.SHARED] / "oddeven.config.json", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(VerificationError, match="returned 2 logits, but the config has 3 labels"):
        OnnxEngine(folders[Form.SHARED]).predict(digit_files[:1], "oddeven")


def test_a_graph_that_does_not_load(folders: dict[Form, Path]) -> None:
    model = folders[Form.SHARED] / "oddeven.onnx"
    proto = onnx.load(model, load_external_data=False)
    proto.opset_import[0].version = 99
    onnx.save(proto, model)
    set_own(folders[Form.SHARED], "oddeven", files={})
    refused(folders[Form.SHARED], CheckpointError, "cannot be loaded by ONNX Runtime", "oddeven")


def test_a_missing_onnx_runtime_names_the_extra(originals: dict[Form, Path]) -> None:
    hidden = "import sys; sys.modules['onnxruntime'] = None"
    code = f"{hidden}; from peanut_serve.cli.predict_command import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, originals[Form.MERGED], "a.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ONNX Runtime is not installed: pip install 'peanut-serve[onnx]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
