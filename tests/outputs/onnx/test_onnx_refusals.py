"""What an export refuses: one line that names the thing, and nothing is written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.commands import Run
from support.paths import DATA
from support.tiny_models import Pair, edit_json, save_adapter, tiny_llama
from transformers import CohereConfig, CohereForCausalLM, ViTConfig, ViTForImageClassification, ViTModel

from converters import ExportOptions, Form, Orientation, Tweaker, open_checkpoint
from converters import save_adapter as save_native
from converters.api.exporting import export_onnx
from converters.errors import ConversionError, MissingDependencyError, VerificationError
from converters.outputs.onnx import parity, task_files
from converters.outputs.onnx.graphs.template import bind

VIT = DATA / "vit-tiny"


@pytest.fixture
def refuse(run_here: Run, tmp_path: Path) -> Callable[..., str]:
    """Run an export of the tiny ViT that has to be refused; returns what it says."""

    def call(*options: str | Path, base: Path = VIT / "base", adapter: Path = VIT / "oddeven") -> str:
        command = ("peanut-merge", "--base", base, "--adapter", adapter, "--format", "onnx", "-o", tmp_path / "out")
        done = run_here(*command, *options)
        assert done.returncode == 1
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*staging*"))
        refused = [line for line in done.stderr.splitlines() if line.startswith("peanut-merge: ")]
        assert len(refused) == 1, done.stderr
        return refused[0]

    return call


def test_an_architecture_that_does_not_work(
    refuse: Callable[..., str], make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    pair = make_pair(CohereForCausalLM(CohereConfig(**sizes, vocab_size=96, num_key_value_heads=2)))
    said = refuse(base=pair.base, adapter=pair.adapter)
    assert "CohereForCausalLM (cohere) cannot be exported" in said
    for known in ("vit", "swin", "roberta", "distilbert", "llama"):
        assert known in said


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    ],
)
def test_positions_that_depend_on_the_length(
    refuse: Callable[..., str], make_pair: Callable[..., Pair], rope: dict[str, object]
) -> None:
    settings = {"max_position_embeddings": 64, "rope_parameters": rope}
    pair = make_pair(tiny_llama(**settings))
    said = refuse(base=pair.base, adapter=pair.adapter)
    assert f"its positions are of the type {rope['rope_type']}, which depends on the length of each text" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--opset", "17"), "--opset 17 is older than what torch writes; expected 18 or newer"),
        (("--opset", "99"), "--opset 99 cannot be run by ONNX Runtime"),
        (("--quantize", "int4"), "--quantize int4 is unknown; expected int8 or fp16"),
        (("--dtype", "bf16"), "ONNX graphs are written in float32, not bf16; see --quantize"),
        (("--swappable", "--share"), "different forms; choose one"),
        (("--swappable", "--quantize", "int8"), "--quantize is for graphs with merged weights of their own"),
        (("--self-merging", "--transformersjs"), "--transformersjs is for graphs with merged weights"),
        (("--resume",), "--resume is for --format merged, not for --format onnx"),
        (("--device", "cuda:9"), "cuda:9"),
        (("--each", "--adapter", VIT / "digits5to9", "--eval-data", "x"), "--eval-data measures one task"),
        (("--eval-data", "nowhere"), "nowhere does not exist"),
    ],
)
def test_options(refuse: Callable[..., str], options: tuple[str, ...], said: str) -> None:
    assert said in refuse(*options)


@pytest.mark.parametrize(
    "option", [("--opset", "18"), ("--quantize", "int8"), ("--swappable",), ("--eval-data", "x")]
)
def test_options_of_another_format(run_here: Run, option: tuple[str, ...]) -> None:
    done = run_here("peanut-merge", "--base", VIT / "base", "--adapter", VIT / "oddeven", *option)
    assert done.returncode == 1
    assert f"{option[0]} is for --format onnx, not for --format merged" in done.stderr


def test_eval_data_of_other_labels(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "data" / "beagle").mkdir(parents=True)
    said = refuse("--eval-data", tmp_path / "data")
    assert "beagle: no label has this name, expected one of 'LABEL_0', 'LABEL_1'" in said


def test_eval_data_of_a_model_with_several_labels(refuse: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(VIT / "base", tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", problem_type="multi_label_classification")
    assert "this model gives several (multi-label)" in refuse("--eval-data", tmp_path, base=tmp_path / "base")


def test_two_tasks_of_one_name(refuse: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(VIT / "oddeven", tmp_path / "more" / "oddeven")
    assert "two adapters are called oddeven" in refuse(
        "--each", "--share", "--adapter", tmp_path / "more" / "oddeven"
    )


def test_a_task_with_the_name_of_the_base_s_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(VIT / "oddeven", tmp_path / "base")
    assert "rename its folder" in refuse("--each", "--share", adapter=tmp_path / "base")


def test_tasks_of_different_classes(refuse: Callable[..., str], tmp_path: Path) -> None:
    save_adapter(ViTModel.from_pretrained(VIT / "base"), tmp_path / "features")
    edit_json(tmp_path / "features" / "adapter_config.json", task_type="FEATURE_EXTRACTION")
    base = tmp_path / "headless"
    ViTModel.from_pretrained(VIT / "base", add_pooling_layer=False).save_pretrained(base)
    said = refuse("--each", "--swappable", "--adapter", tmp_path / "features", base=base)
    assert "ViTForImageClassification" in said
    assert "ViTModel" in said


def test_an_update_that_is_not_of_low_rank(tmp_path: Path) -> None:
    theta = torch.randn(2, 192) / 9
    module = "vit.layers.0.attention.q_proj"
    tweaker = Tweaker(Orientation.COLUMNS, theta, theta.T.contiguous(), output_act_fn="tanh")
    save_native(tmp_path / "tanh", {module: tweaker}, base=open_checkpoint(VIT / "base"))
    with pytest.raises(ConversionError, match="ends in an activation"):
        export_onnx(VIT / "base", tmp_path / "tanh", tmp_path / "out", options=ExportOptions(form=Form.SWAPPABLE))
    export_onnx(VIT / "base", tmp_path / "tanh", tmp_path / "out", options=ExportOptions(form=Form.SELF_MERGING))
    assert (tmp_path / "out" / "tanh.onnx").exists()


def test_a_head_that_nobody_brings(tmp_path: Path) -> None:
    """The config speaks of a classifier, and neither base nor adapter has its weights."""
    model = ViTForImageClassification(ViTConfig.from_pretrained(VIT / "base"))
    save_adapter(model, tmp_path / "adapter")
    ViTModel.from_pretrained(VIT / "base", add_pooling_layer=False).save_pretrained(tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", architectures=["ViTForImageClassification"])
    with pytest.raises(ConversionError, match=r"neither the base nor adapter has classifier\.bias"):
        export_onnx(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a fault of the tracer, or of ours: one bias of a written graph is off."""
    write = task_files.write_merged

    def spoil(model: Path, *given: object) -> None:
        write(model, *given)
        proto = onnx.load(model)
        bias = next(t for t in proto.graph.initializer if t.name == "vit.layernorm.bias")
        bias.raw_data = (onnx.numpy_helper.to_array(bias) + np.float32(0.01)).tobytes()
        onnx.save(proto, model)

    monkeypatch.setattr(task_files, "write_merged", spoil)
    with pytest.raises(VerificationError, match="differs from the merged torch model's by"):
        export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out", options=ExportOptions(verify=False))
    manifest = json.loads((tmp_path / "out" / "peanut_manifest.json").read_text())
    assert manifest["tasks"]["oddeven"]["verified"] is None


def test_an_output_that_is_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.np, "abs", lambda array: np.full_like(array, np.nan))
    with pytest.raises(VerificationError, match="differs from the merged torch model's by nan"):
        export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out")


def test_a_graph_that_is_not_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*given: object, **settings: object) -> onnx.ModelProto:
        proto = bind(*given, **settings)
        proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = 77
        return proto

    monkeypatch.setattr("converters.outputs.onnx.graphs.merged.bind", spoilt)
    with pytest.raises(VerificationError, match=r"model\.onnx is not valid ONNX"):
        export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out")


def test_an_existing_output_is_not_touched(refuse: Callable[..., str], tmp_path: Path, run_here: Run) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    command = ("peanut-merge", "--base", VIT / "base", "--adapter", VIT / "oddeven", "--format", "onnx")
    for options in ((), ("--overwrite",)):
        done = run_here(*command, "-o", tmp_path / "mine", *options)
        assert done.returncode == 1
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            patched.setattr(
                "converters.outputs.onnx.format.find_spec", lambda asked, name=name: None if asked == name else 1
            )
            with pytest.raises(MissingDependencyError, match=rf"needs {name}: pip install 'peanut-serve\[onnx\]'"):
                export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out")


def test_a_changed_file_is_found_later(tmp_path: Path, run_here: Run) -> None:
    export_onnx(VIT / "base", VIT / "oddeven", tmp_path / "out", options=ExportOptions(form=Form.SWAPPABLE))
    done = run_here("peanut-inspect", tmp_path / "out", "--verify")
    assert "all 2 files are as they were written" in done.stdout
    file = tmp_path / "out" / "oddeven.onnx_adapter"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = run_here("peanut-inspect", tmp_path / "out", "--verify")
    assert done.returncode == 1
    assert "oddeven.onnx_adapter changed since it was written" in done.stderr
    file.unlink()
    assert "oddeven.onnx_adapter is missing" in run_here("peanut-inspect", tmp_path / "out", "--verify").stderr


def test_a_task_whose_files_would_have_too_long_names(refuse: Callable[..., str], tmp_path: Path) -> None:
    adapter = tmp_path / ("x" * 250)
    shutil.copytree(VIT / "oddeven", adapter)
    assert "is too long for the names of its files (at most 242 bytes)" in refuse("--swappable", adapter=adapter)
