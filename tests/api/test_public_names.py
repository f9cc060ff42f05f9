"""What `from converters import ...` offers."""

import subprocess
import sys

import pytest

import converters

# a name that is taken away breaks somebody's code: it goes with a new major version, and from this list
PUBLIC = {
    "Adapter", "Checkpoint", "ExportOptions", "Factors", "Form", "MergeResult", "Orientation", "PeanutError", "Plan",
    "Tweaker", "Weighted", "__version__", "delta_weight", "export_onnx", "factors", "load_adapter", "merge",
    "merge_each", "open_adapters", "open_checkpoint", "prepare_merge", "record_base", "run_merge", "save_adapter",
}  # fmt: skip


def test_the_names() -> None:
    assert set(converters.__all__) >= PUBLIC
    assert converters.__all__ == sorted(converters.__all__)


@pytest.mark.parametrize("name", converters.__all__)
def test_every_name_resolves(name: str) -> None:
    found = getattr(converters, name)
    assert getattr(found, "__name__", name) == name
    assert getattr(found, "__doc__", None)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'converters' has no attribute 'mrege'"):
        converters.mrege  # noqa: B018


def test_what_an_export_is_asked_for_needs_no_onnx() -> None:
    """The options are named where the packages of the extra are not installed."""
    code = "import sys; from converters import ExportOptions, Form; ExportOptions(form=Form.SWAPPABLE); " \
           "print(sorted({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
