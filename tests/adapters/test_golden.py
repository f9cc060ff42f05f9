"""Every file the PEANuT authors' code saves, against the numbers it computes."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.golden import CASES, Golden

from converters import delta_weight, load_adapter, merge

LAYOUTS = {"authors-llm": "authors-llm", "authors-vision": "authors-vision", "authors-nlu": "authors-glue"}


def test_there_are_cases_of_all_their_codes() -> None:
    assert len(CASES) == 2 + 5 * 3 + 2 * 2
    assert {case.folder.parent.name for case in CASES} == set(LAYOUTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_weights_and_logits_are_those_of_the_authors(case: Golden, tmp_path: Path) -> None:
    adapter = load_adapter(case.adapter, **case.options)
    assert adapter.layout == LAYOUTS[case.folder.parent.name]
    base = load_file(case.base / "model.safetensors")
    expected = case.deltas
    assert {f"{module}.weight" for module in adapter.modules} == set(expected)
    for name, delta in expected.items():
        w0 = base[name] if name in base else base[name.split(".", 1)[1]]
        found = delta_weight(w0, adapter.tweaker(name.removesuffix(".weight")))
        assert (found - delta).norm() <= 1e-6 * delta.norm(), name
        assert delta.norm() > 0
    merge(case.base, case.adapter, tmp_path / "merged", **case.options)
    found, wanted = case.logits(tmp_path / "merged")
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if c.file == "full_state_dict.bin"], ids=lambda case: case.name)
def test_a_whole_state_dict_has_the_digest_of_its_theta(case: Golden) -> None:
    theta = Golden(case.folder, "theta.safetensors")
    assert load_adapter(case.adapter, **case.options).digest == load_adapter(theta.adapter, **case.options).digest


def test_the_naive_class_is_the_general_one_under_other_names() -> None:
    folders = {case.folder.name: case for case in CASES if case.file == "theta.safetensors"}
    naive = load_adapter(folders["naive_depth6_qv"].adapter)
    assert {naive.describe(module).facts["depth"] for module in naive.modules} == {2}
    parts = naive.modules["vit.encoder.layer.0.attention.attention.query"].parts
    layers = [parts[f"{side}.{i}"] for side in ("encoders", "decoders") for i in range(2)]
    assert [key.split(".")[-2] for key in layers] == ["i1", "i2", "i3", "i4"]
