"""The formula, against the code of PEFT and the numbers of the authors' own code."""

import pytest
import torch
from peft import PeanutConfig, get_peft_model
from safetensors.torch import load_file
from support.golden import GOLDEN

from converters import Orientation, Tweaker, delta_weight, factors
from converters.errors import BaseMismatchError, ThetaError
from converters.files.blocks import block_rows

ACTIVATIONS = ["relu", "gelu", "silu", "tanh", "leaky_relu"]


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_columns_equals_peft(depth: int, act_fn: str) -> None:
    torch.manual_seed(depth)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False)).double()
    config = PeanutConfig(r=5, depth=depth, act_fn=act_fn, scaling=0.7, target_modules=["0"], init_weights=False)
    layer = get_peft_model(model, config, autocast_adapter_dtype=False).double().base_model.model[0]
    theta = {name: p.detach() for name, p in layer.named_parameters()}
    tweaker = Tweaker(
        Orientation.COLUMNS,
        theta["peanut_A.default.weight"],
        theta["peanut_B.default.weight"],
        tuple(theta[f"peanut_encoders.default.{i}.weight"] for i in range(depth)),
        tuple(theta[f"peanut_decoders.default.{i}.weight"] for i in range(depth)),
        act_fn,
        0.7,
    )
    w0 = theta["base_layer.weight"]
    assert torch.allclose(delta_weight(w0, tweaker), layer.get_delta_weight("default"), rtol=1e-12, atol=1e-14)


def test_rows_equals_the_authors_llm_code() -> None:
    folder = GOLDEN / "authors-llm" / "square"
    theta = torch.load(folder / "adapter" / "adapter_model.bin", weights_only=True)
    base, expected = (
        load_file(folder / "base" / "model.safetensors"),
        load_file(folder / "expected_delta.safetensors"),
    )
    for name, delta in expected.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = theta[f"{key}.lora_A.weight"], theta[f"{key}.lora_B.weight"]
        found = delta_weight(base[name], Tweaker(Orientation.ROWS, a, b, scaling=12 / 6))
        assert (found - delta).norm() <= 1e-6 * delta.norm(), name


@pytest.mark.parametrize(("case", "depth"), [("vanilla_qv", 0), ("multilayer_depth6_qv", 2)])
def test_columns_equals_the_authors_vision_code(case: str, depth: int) -> None:
    folder = GOLDEN / "authors-vision" / case
    theta, base = load_file(folder / "theta.safetensors"), load_file(folder / "base" / "model.safetensors")
    for name, delta in load_file(folder / "expected_delta.safetensors").items():
        parent, module = name.removesuffix(".weight").rsplit(".", 1)
        key = f"{parent}.{module[0]}_adapter"
        hidden = [tuple(theta[f"{key}.{side}.{i}.weight"] for i in range(depth)) for side in ("encoders", "decoders")]
        tweaker = Tweaker(Orientation.COLUMNS, theta[f"{key}.A.weight"], theta[f"{key}.B.weight"], *hidden)
        found = delta_weight(base[name.removeprefix("vit.")], tweaker)
        assert (found - delta).norm() <= 1e-6 * delta.norm(), name


@pytest.mark.parametrize("orientation", [Orientation.ROWS, Orientation.COLUMNS])
def test_blocks_do_not_change_the_result(orientation: Orientation) -> None:
    out, width = 3 * block_rows(4096) + 7, 4096
    size = out if orientation is Orientation.COLUMNS else width
    torch.manual_seed(0)
    w0, a, b = torch.randn(out, width) / 64, torch.randn(3, size) / 64, torch.randn(size, 3)
    tweaker = Tweaker(orientation, a, b, act_fn="silu", scaling=2.0)
    wide = [t.double() for t in (w0, a, b)]
    sigma = torch.nn.functional.silu
    if orientation is Orientation.COLUMNS:
        reference = 2.0 * wide[2] @ sigma(wide[1] @ wide[0])
    else:
        reference = 2.0 * sigma(wide[0] @ wide[1].T) @ wide[2].T
    assert (delta_weight(w0, tweaker) - reference).norm() < 1e-6 * reference.norm()


def test_factors_are_an_exact_low_rank_update() -> None:
    torch.manual_seed(0)
    w0 = torch.randn(20, 12, dtype=torch.float64)
    tweaker = Tweaker(Orientation.COLUMNS, torch.randn(3, 20), torch.randn(20, 3), scaling=0.3)
    found = factors(w0, tweaker)
    assert found.up.shape == (20, 3)
    assert found.down.shape == (3, 12)
    assert found.up.dtype is torch.float64
    delta = delta_weight(w0, tweaker)
    assert torch.equal(found.up @ found.down, delta)
    assert found.norm() == pytest.approx(float(delta.norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_weights_are_evaluated_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w0 = torch.randn(64, 48).to(dtype)
    tweaker = Tweaker(Orientation.COLUMNS, torch.randn(4, 64), torch.randn(64, 4))
    reference = tweaker.b.double() @ torch.relu(tweaker.a.double() @ w0.double())
    found = delta_weight(w0, tweaker)
    assert found.dtype is torch.float32
    assert (found - reference).norm() < 1e-6 * reference.norm()


def test_a_weight_of_another_shape_is_refused() -> None:
    tweaker = Tweaker(Orientation.COLUMNS, torch.zeros(2, 8), torch.zeros(8, 2))
    with pytest.raises(BaseMismatchError, match=r"\(6, 8\), θ was trained for out = 8"):
        factors(torch.zeros(6, 8), tweaker)


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ({"b": torch.zeros(2, 8)}, r"B \(2, 8\)"),
        ({"encoders": (torch.zeros(2, 2),)}, "1 encoders but 0 decoders"),
        ({"encoders": (torch.zeros(3, 2),), "decoders": (torch.zeros(2, 2),)}, r"\(3, 2\); expected \(2, 2\)"),
        ({"act_fn": "prelu"}, "unknown act_fn 'prelu'"),
    ],
)
def test_theta_that_does_not_fit_itself_is_refused(theta: dict, message: str) -> None:
    whole = {"orientation": Orientation.COLUMNS, "a": torch.zeros(2, 8), "b": torch.zeros(8, 2), **theta}
    with pytest.raises(ThetaError, match=message):
        Tweaker(**whole)
