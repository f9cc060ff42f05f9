"""Methods that decompose W0: where the decomposition is not unique, and parts of it that are damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from support.damage import changed
from support.method_samples import IN, OUT, SAMPLES
from support.method_zoo import CASES
from support.peft_methods import MODELS, train
from support.tiny_models import edit_weights, tiny_llama

from converters import load_adapter, merge
from converters.errors import AdapterConfigError, BaseMismatchError, ConversionError, ThetaError
from converters.methods.base import Method


def trained(tmp_path: Path, name: str) -> Path:
    train(MODELS["llama"](), CASES[name].on("llama"), tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "adapter"


def with_values(values: list[float]) -> torch.Tensor:
    """W0 (OUT, IN) with these singular values, and zeros."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in (OUT, IN))
    return u[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ v[: len(values)]


def sample(name: str) -> Method:
    torch.manual_seed(0)
    return SAMPLES[name]().to("cpu", torch.float64)


SPREAD = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_what_osf_keeps_has_to_be_determined() -> None:
    """8 of 10 singular values stay: the 8th and the 9th must differ; others need not."""
    osf = sample("osf")
    wanted = with_values(SPREAD[:8])
    trained_part = osf.parts["U"] * osf.parts["S"] @ osf.parts["V"]
    found = with_values(SPREAD) + osf.delta(with_values(SPREAD))
    assert torch.allclose(found, wanted + trained_part, rtol=1e-11, atol=1e-11)
    twins = [10.0, 10.0, *SPREAD[2:]]
    assert torch.allclose(
        with_values(twins) + osf.delta(with_values(twins)),
        with_values(twins[:8]) + trained_part,
        rtol=1e-11,
        atol=1e-11,
    )
    with pytest.raises(ConversionError, match="the singular values 8 and 9 of W0 are equal in float32"):
        osf.delta(with_values([*SPREAD[:8], 3.0 - 1e-6, 1.0]))
    low = [*SPREAD[:5], 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]  # noise is nothing to tell apart
    assert torch.allclose(
        with_values(low) + osf.delta(with_values(low)), with_values(low[:5]) + trained_part, atol=1e-8
    )


def test_psoft_turns_vectors_that_have_to_be_determined() -> None:
    psoft = sample("psoft")
    psoft.delta(with_values(SPREAD))
    with pytest.raises(ConversionError, match="some of the 3 largest singular values of W0 are equal in float32"):
        psoft.delta(with_values([10.0, 9.0, 9.0 - 1e-9, *SPREAD[3:]]))
    psoft.delta(with_values([*SPREAD[:5], 5.0 - 1e-9, *SPREAD[6:]]))
    with pytest.raises(ConversionError, match="some of the 3 largest singular values of W0 are equal in float32"):
        psoft.delta(with_values([10.0, 9.0, *[0.0] * (len(SPREAD) - 2)]))


def test_psoft_needs_a_weight_of_its_rank() -> None:
    with pytest.raises(BaseMismatchError, match="smaller than r = 3"):
        sample("psoft").check_fits((2, 9))


def test_psoft_without_mkl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained(tmp_path, "psoft")
    load_adapter(adapter)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(AdapterConfigError, match="torch has no MKL on this machine"):
        load_adapter(adapter)


def test_the_frobenius_bound_of_psoft() -> None:
    """A long Q is shortened, a short one is not."""
    for length, shortened in ((0.1, False), (3.0, True)):
        numbers = torch.ones(3, dtype=torch.float64) * length
        settings = {"r": 3, "init": "psoft_init", "orthogonal": True, "neumann_terms": 2}
        one, other = (
            type(sample("psoft")).from_parts({"R": numbers}, {**settings, "eps": eps}).change() for eps in (None, 0.5)
        )
        assert torch.equal(one, other) != shortened
        assert not shortened or float(other.norm()) == pytest.approx(1.0)


DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "singular": ("frod_V.self_attn_q_proj", torch.zeros_like, "frod_V is singular"),
    "another size": ("frod_s_size.self_attn_q_proj", lambda t: t + 1, r"frod_s_size is \[33, 33\]"),
    "places": ("frod_s_indices.self_attn_q_proj", lambda t: t + 32, "frod_s_indices has indices from"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_frod_shares_is_damaged(tmp_path: Path, case: str) -> None:
    mark, change, message = DAMAGES[case]
    adapter = trained(tmp_path, "frod")
    edit_weights(adapter / "adapter_model.safetensors", changed(mark, change))
    with pytest.raises(ThetaError, match=message):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("bert.encoder.layer.0.attention.output.dense", "attention_output"),
        ("bert.encoder.layer.0.output.dense", "output_dense"),
        ("lm_head", "lm_head"),
        ("head.0", "head_0"),
        ("blocks.3.proj", "proj"),
    ],
)
def test_the_category_of_a_module_is_that_of_peft(module: str, category: str) -> None:
    from peft.tuners.frod.model import _category_from_key

    form = type(sample("frod")).peft
    assert form is not None
    assert form.groups({}, [module], lambda module, part: torch.empty(0)) == {module: category}
    assert _category_from_key(module) == category


@pytest.mark.parametrize("name", ["osf", "psoft", "adamss", "deft qr"])
def test_keys_as_in_memory(tmp_path: Path, name: str) -> None:
    """`torch.save(model.state_dict())` has the adapter's name within the names of parameters."""
    adapter = trained(tmp_path, name)
    saved = load_adapter(adapter)
    fresh = type(tiny_llama()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    state = PeftModel.from_pretrained(fresh, adapter).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, adapter / "adapter_model.safetensors")
    in_memory = load_adapter(adapter)
    assert in_memory.modules.keys() == saved.modules.keys()
    assert in_memory.digest == saved.digest
    assert any(".default" in key for theta in in_memory.modules.values() for key in theta.parts.values())
