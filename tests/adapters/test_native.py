"""The native layout: the paper's variants that no other code writes, against their formulas in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.native_variants import MODULE, variants
from support.tiny_models import edit_json, edit_weights, tiny_llama

from converters import Orientation, Tweaker, load_adapter, merge, open_checkpoint, save_adapter
from converters.errors import (
    AdapterConfigError,
    BaseMismatchError,
    OptionError,
    OutputExistsError,
    PeanutError,
    ThetaError,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", variants())
def test_a_saved_variant_merges_to_its_formula(base: Path, tmp_path: Path, name: str) -> None:
    tweaker, delta = variants()[name]
    save_adapter(tmp_path / "adapter", {MODULE: tweaker})
    adapter = load_adapter(tmp_path / "adapter")
    assert (adapter.layout, adapter.evidence) == ("peanut", "peanut_config.json is there")
    result = merge(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    expected = before[f"{MODULE}.weight"].double() + delta
    assert (after[f"{MODULE}.weight"] - expected).abs().max() <= 2.0**-23 * expected.abs().max()
    assert delta.abs().max() >= 1e-3
    assert result.verification.max_ulp <= 0.5 + 2.0**-11
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{MODULE}.weight"}


@pytest.mark.parametrize("name", variants())
def test_everything_the_mathematics_needs_is_stored(tmp_path: Path, name: str) -> None:
    tweaker, _ = variants()[name]
    save_adapter(tmp_path / "adapter", {MODULE: tweaker})
    found = load_adapter(tmp_path / "adapter").tweaker(MODULE)
    for field in ("orientation", "act_fn", "scaling", "residual", "output_act_fn", "negative_slope"):
        assert getattr(found, field) == getattr(tweaker, field)
    for theirs, ours in zip((found.a, found.b), (tweaker.a, tweaker.b), strict=True):
        assert torch.equal(theirs, ours)
    assert len(found.encoders) == len(tweaker.encoders)
    assert len(found.decoders) == len(tweaker.decoders)


def test_head_labels_and_base_are_recorded(base: Path, tmp_path: Path) -> None:
    tweaker, _ = variants()["deep"]
    head = torch.randn(3, 32)
    save_adapter(
        tmp_path / "adapter", {MODULE: tweaker}, saved={"score.weight": head}, labels=["a", "b", "c"],
        base=open_checkpoint(base), base_name="org/tiny", task_type="SEQ_CLS",
    )  # fmt: skip
    adapter = load_adapter(tmp_path / "adapter")
    assert (adapter.base_name, adapter.labels) == ("org/tiny", ("a", "b", "c"))
    result = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert result.plan.config["architectures"] == ["LlamaForSequenceClassification"]
    assert result.plan.config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["score.weight"], head)
    edit_weights(base / "model.safetensors", lambda w: w["model.norm.weight"].add_(0.1))
    with pytest.raises(BaseMismatchError, match="recorded on a base with fingerprint"):
        merge(base, tmp_path / "adapter", tmp_path / "other")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    tweaker, _ = variants()["sine"]
    with pytest.raises(ThetaError, match="no tweakers"):
        save_adapter(tmp_path / "adapter", {})
    bad = Tweaker(Orientation.ROWS, tweaker.a * math.nan, tweaker.b)
    with pytest.raises(ThetaError, match="NaN or Inf"):
        save_adapter(tmp_path / "adapter", {MODULE: bad})
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "adapter", {MODULE: tweaker})
    with pytest.raises(OutputExistsError, match="exists; choose another folder"):
        save_adapter(tmp_path / "adapter", {MODULE: tweaker})


def settings_of(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "peanut_config.json").read_text())
    config["modules"][MODULE] |= changes
    (folder / "peanut_config.json").write_text(json.dumps(config))


CONFIGS = {
    "version": ({"format_version": 2}, "format_version = 2; this version reads 1"),
    "unknown": ({"dropout": 0.1}, "'dropout' is unknown"),
    "no modules": ({"modules": {}}, "no modules"),
    "labels": ({"labels": [1]}, "expected a list of strings"),
    "task": ({"task_type": 1}, "task_type = 1; expected a string"),
}
SETTINGS = {
    "orientation": ({"orientation": "diagonal"}, "orientation = 'diagonal' is unknown"),
    "act_fn": ({"act_fn": "sine"}, "act_fn = 'sine'; known are"),
    "no act_fn": ({"act_fn": None}, "act_fn = None; known are"),
    "output": ({"output_act_fn": 1}, "output_act_fn = 1; known are"),
    "scaling": ({"scaling": "big"}, "scaling = 'big'; expected a finite number"),
    "residual": ({"residual": 1}, "residual = 1; expected true or false"),
    "unknown setting": ({"bias": True}, "must have exactly the settings"),
    "residual without decoders": ({"residual": True}, "1 encoders but 0 decoders; mirrored residuals need as many"),
}


@pytest.mark.parametrize("case", [*CONFIGS, *SETTINGS])
def test_a_config_that_says_something_else_is_refused(tmp_path: Path, case: str) -> None:
    tweaker, _ = variants()["odd depth without residuals"]
    save_adapter(tmp_path / "adapter", {MODULE: tweaker})
    changes, message = CONFIGS.get(case) or SETTINGS[case]
    if case in CONFIGS:
        edit_json(tmp_path / "adapter" / "peanut_config.json", **changes)
    else:
        settings_of(tmp_path / "adapter", **changes)
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(tmp_path / "adapter")


def test_weights_and_config_disagree(tmp_path: Path) -> None:
    tweaker, _ = variants()["deep"]
    save_adapter(tmp_path / "adapter", {MODULE: tweaker})
    file = tmp_path / "adapter" / "peanut_theta.safetensors"
    with pytest.raises(OptionError, match="states the scaling; leave it out"):
        load_adapter(tmp_path / "adapter", scaling=1.0)
    edit_weights(file, lambda w: {**w, "theta.other.A": torch.zeros(2, 2)})
    with pytest.raises(ThetaError, match=r"theta.other.A belongs to no module"):
        load_adapter(tmp_path / "adapter")
    edit_weights(file, lambda w: {n: t for n, t in w.items() if "other" not in n and not n.endswith("encoders.0")})
    with pytest.raises(ThetaError, match=r"k_proj: encoders.0 is missing; the adapter is incomplete"):
        load_adapter(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(PeanutError, match=r"no peanut_theta.safetensors; the adapter has a config but no weights"):
        load_adapter(tmp_path / "adapter")
