"""The ONNX engine on handwritten graphs: which files are checked, locking, and scores."""

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support.commands import Run
from support.companions.preprocessor_folders import image_model, text_model

from converters.errors import CheckpointError, OptionError, PeanutError, VerificationError
from converters.files.hashing import hash_file
from converters.inference.adapter_file import write_adapter_file
from peanut_serve.classify import loaded
from peanut_serve.classify import tasks as onnx_tasks
from peanut_serve.classify.engine import OnnxEngine
from peanut_serve.classify.predictions import predictions
from peanut_serve.classify.tasks import OnnxTask

BASE, SIZE = "sampled-sha256:00", 3 * 6 * 8
WEIGHT = np.random.default_rng(0).standard_normal((SIZE, 3), np.float32)
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_channels": 3}
LABELS = ("cat", "dog", "horse")
PIXELS = {"pixel_values": np.random.default_rng(1).standard_normal((2, 3, 6, 8), np.float32)}


def write_graph(file: Path, swappable: bool = False) -> None:
    """pixel_values (batch, 3, 6, 8) -> logits (batch, 3): x (W + A B) + head, which is NaN without an adapter."""
    tensors = {"W": WEIGHT}
    if swappable:
        tensors |= {"A": WEIGHT[:, :0], "B": WEIGHT[:0], "head": np.full(3, np.nan, np.float32)}
    steps = [("Flatten", ["pixel_values"], "x"), ("MatMul", ["x", "W"], "base" if swappable else "logits")]
    if swappable:
        steps += [("MatMul", ["x", "A"], "xA"), ("MatMul", ["xA", "B"], "low")]
        steps += [("Add", ["base", "low"], "sum"), ("Add", ["sum", "head"], "logits")]
    shapes = {"pixel_values": ["batch", 3, 6, 8]}
    shapes |= {"A": [SIZE, "r"], "B": ["r", 3], "head": [3]} if swappable else {}
    graph = helper.make_graph(
        [helper.make_node(kind, given, [made]) for kind, given, made in steps],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"peanut.base": BASE})
    onnx.save(model, file)


def write_config(file: Path, files: tuple[str, ...], changes: dict[str, object] | None = None, **own: object) -> None:
    own = {"base": BASE, "form": "merged", "adapter": None, **own}
    own["files"] = {name: hash_file(file.parent / name) for name in files}
    labels = {str(i): label for i, label in enumerate(LABELS)}
    file.write_text(json.dumps({**VIT, "id2label": labels, **(changes or {}), "peanut": own}))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """One task, in float32 and a stand-in for int8."""
    folder = image_model(tmp_path / "pets")
    models = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}
    for name in models.values():
        write_graph(folder / name)
    write_config(folder / "config.json", tuple(models.values()), models=models)
    return folder


@pytest.fixture
def swappable(tmp_path: Path) -> Path:
    """Two tasks, whose adapters add 1 and 2 to every logit."""
    folder = image_model(tmp_path / "tasks")
    write_graph(folder / "model.onnx", swappable=True)
    for number, task in enumerate(("cars", "pets"), 1):
        head = {"head": torch.full((3,), float(number))}
        write_adapter_file(folder / f"{task}.onnx_adapter", head, BASE)
        rest = {"form": "swappable", "models": {"fp32": "model.onnx"}, "adapter": f"{task}.onnx_adapter"}
        write_config(folder / f"{task}.config.json", (f"{task}.onnx_adapter",), **rest)
    (folder / "config.json").write_text(json.dumps(VIT))
    hashes = {"model.onnx": hash_file(folder / "model.onnx")}
    (folder / "peanut_manifest.json").write_text(json.dumps({"files": hashes}))
    return folder


def refused(
    error: type[PeanutError], message: str, folder: Path, arrays: object = PIXELS, task: str | None = None
) -> None:
    with pytest.raises(error, match=message) as found:
        OnnxEngine(folder).run(arrays, task)
    assert "\n" not in str(found.value)


def test_the_numbers(merged: Path, swappable: Path) -> None:
    wanted = PIXELS["pixel_values"].reshape(2, SIZE) @ WEIGHT
    np.testing.assert_allclose(OnnxEngine(merged).run(PIXELS), wanted, rtol=1e-4, atol=1e-4)
    engine = OnnxEngine(swappable)
    for number, task in enumerate(("cars", "pets"), 1):
        np.testing.assert_allclose(engine.run(PIXELS, task), wanted + number, rtol=1e-4, atol=1e-4)


def test_a_precision_needs_only_its_own_files(merged: Path) -> None:
    (merged / "model.onnx").unlink()
    assert OnnxEngine(merged, precision="int8").run(PIXELS).shape == (2, 3)
    refused(CheckpointError, r"model\.onnx of pets is missing", merged)
    (merged / "model_quantized.onnx").write_bytes(b"other")
    with pytest.raises(VerificationError, match=r"model_quantized\.onnx is not the file"):
        OnnxEngine(merged, precision="int8").run(PIXELS)


def test_a_shared_file_is_hashed_once(swappable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(file: Path) -> str:
        hashed.append(file.name)
        return hash_file(file)

    monkeypatch.setattr(onnx_tasks, "hash_file", counting)
    engine = OnnxEngine(swappable)
    for task in ("cars", "pets", "cars"):
        engine.run(PIXELS, task)
    assert sorted(hashed) == ["cars.onnx_adapter", "model.onnx", "pets.onnx_adapter"]


def test_a_swappable_graph_is_checked_against_the_manifest(swappable: Path) -> None:
    content = bytearray((swappable / "model.onnx").read_bytes())
    content[content.find(WEIGHT.tobytes()) + 2] ^= 1
    (swappable / "model.onnx").write_bytes(content)
    refused(VerificationError, r"model\.onnx is not the file that was written for cars", swappable, task="cars")


def test_a_ready_task_does_not_wait_for_others(swappable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxEngine(swappable)
    engine.run(PIXELS, "cars")
    began, go_on = threading.Event(), threading.Event()
    original = OnnxTask.check_files

    def held(self: OnnxTask, *arguments: object) -> None:
        began.set()
        assert go_on.wait(20)
        original(self, *arguments)

    monkeypatch.setattr(OnnxTask, "check_files", held)
    first = threading.Thread(target=engine.run, args=(PIXELS, "pets"))
    second = threading.Thread(target=engine.run, args=(PIXELS, "cars"))
    first.start()
    assert began.wait(20)
    second.start()
    second.join(5)
    waited = second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert not waited


def test_one_session_for_two_tasks(swappable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    session = loaded.Session
    monkeypatch.setattr(loaded, "Session", lambda model, threads: opened.append(model) or session(model, threads))
    engine = OnnxEngine(swappable)
    for task in ("cars", "pets"):
        engine.run(PIXELS, task)
    assert len(opened) == 1


def test_invalid_inputs(merged: Path) -> None:
    refused(OptionError, "pets needs the inputs pixel_values; pixel_values is missing", merged, {})
    small = {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}
    refused(
        OptionError, r"pets cannot run on pixel_values float32\(1, 3, 4, 4\): .*invalid dimensions", merged, small
    )
    doubles = {"pixel_values": PIXELS["pixel_values"].astype(np.float64)}
    refused(OptionError, r"pets cannot run on pixel_values float64.*data type", merged, doubles)


def test_run_checks_its_output_too(merged: Path, swappable: Path) -> None:
    write_config(merged / "config.json", (), {"id2label": {"0": "a", "1": "b"}}, models={"fp32": "model.onnx"})
    refused(VerificationError, "returned 3 logits, but the config has 2 labels", merged)
    write_adapter_file(swappable / "cars.onnx_adapter", {"A": torch.zeros(SIZE, 1), "B": torch.zeros(1, 3)}, BASE)
    rest = {"form": "swappable", "models": {"fp32": "model.onnx"}, "adapter": "cars.onnx_adapter"}
    write_config(swappable / "cars.config.json", (), **rest)
    refused(VerificationError, "cars: the graph returned NaN", swappable, task="cars")


@pytest.mark.parametrize("own", [{"form": "later"}, {"form": "swappable"}, {"adapter": "x.onnx_adapter"}])
def test_an_unknown_form(merged: Path, own: dict[str, str]) -> None:
    write_config(merged / "config.json", (), models={"fp32": "model.onnx"}, **own)
    refused(
        CheckpointError, "expected one of merged, shared, self-merging, swappable, and an adapter only with", merged
    )


def test_foreign_configs(merged: Path, swappable: Path) -> None:
    (swappable / "other.config.json").write_text('{"model_type": "vit"}')
    assert list(OnnxEngine(swappable).tasks) == ["cars", "pets"]
    write_config(merged / "config.json", (), models={"fp32": "a\0b"})
    refused(CheckpointError, r"pets refers to 'a\\x00b', which is not a valid file name", merged)


def test_scores() -> None:
    def scores(*logits: float, problem_type: str | None = None) -> list[tuple[str, float]]:
        found = predictions(np.array(logits, np.float32), LABELS[: len(logits)], 9, problem_type)
        return [(one.label, one.score) for one in found]

    assert scores(0, np.log(3)) == [("dog", pytest.approx(0.75)), ("cat", pytest.approx(0.25))]
    assert scores(1e4, -1e4) == [("cat", 1), ("dog", 0)]
    assert scores(-2.5) == [("cat", -2.5)]
    assert scores(-2.5, 4, problem_type="regression") == [("dog", 4), ("cat", -2.5)]
    many = scores(-1e4, np.log(3), 1e4, problem_type="multi_label_classification")
    assert many == [("horse", 1), ("dog", pytest.approx(0.75)), ("cat", 0)]


def test_the_table_in_a_pipe(merged: Path, tmp_path: Path, run_here: Run) -> None:
    """Full names, one line per label, and nothing interpreted as markup."""
    file = tmp_path / ("[bold]" + "long-" * 30 + ".png")
    Image.new("RGB", (8, 6)).save(file)
    done = run_here("peanut-serve", "predict", merged, file, "--top-k", "2")
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [str(file), ""]
    (best,) = OnnxEngine(merged).predict([file], top_k=2)
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [(one.label, f"{one.score:.4f}") for one in best]
    with pytest.raises(OptionError, match="top_k is 0; expected 1 or more"):
        OnnxEngine(merged).predict([file], top_k=0)


def write_text_graph(folder: Path, kind: str, taken: str) -> None:
    """A graph of texts, whose logit is the mean of one of its inputs."""
    names = ("input_ids", "attention_mask", *["token_type_ids"] * (kind == "bert"))
    given = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])
    nodes = [
        helper.make_node("Cast", [taken], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["logits"], axes=[1]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(helper.make_graph(nodes, "graph", given, [logits]), opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, {"peanut.base": BASE})
    onnx.save(model, folder / "model.onnx")
    text_model(folder)
    name = {"bert": "Bert", "distilbert": "DistilBert"}[kind]
    config = {"model_type": kind, "architectures": [f"{name}ForSequenceClassification"], "vocab_size": 8}
    write_config(folder / "config.json", (), {**config, "id2label": {"0": "x"}}, models={"fp32": "model.onnx"})


def test_lines_of_a_text_file(merged: Path, tmp_path: Path, run_here: Run) -> None:
    """A byte order mark is ignored; only a newline ends a line."""
    write_text_graph(merged, "distilbert", "attention_mask")
    (tmp_path / "texts.txt").write_bytes("\ufeffgood\u2028film\r\n\nbad\n".encode())
    done = run_here("peanut-serve", "predict", merged, "--text-file", tmp_path / "texts.txt", "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [one["input"] for one in answers] == ["good\u2028film", "bad"]
    assert answers[1]["predictions"] == [{"label": "x", "score": pytest.approx(0.75)}]


def test_pairs_of_texts(merged: Path, tmp_path: Path, run_here: Run) -> None:
    """The second text has token types of its own, on the command line and in a file."""
    write_text_graph(merged, "bert", "token_type_ids")
    (tmp_path / "pairs.txt").write_text("good film\tbad\n")
    texts = ("--text-file", tmp_path / "pairs.txt", "good", "bad film")
    command = ("peanut-serve", "predict", merged, "--pairs", *texts)
    done = run_here(*command, "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [one["input"] for one in answers] == [["good", "bad film"], ["good film", "bad"]]
    # [CLS] good [SEP] bad film [SEP], and [CLS] good film [SEP] bad [SEP]
    assert [one["predictions"][0]["score"] for one in answers] == pytest.approx([3 / 6, 2 / 6])
    assert "good | bad film" in run_here(*command).stdout
    done = run_here("peanut-serve", "predict", merged, "--pairs", "good", "bad", "film")
    assert done.returncode == 1
    assert "--pairs needs an even number of texts, found 3" in done.stderr
