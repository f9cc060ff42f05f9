"""`peanut-inspect OUTPUT --verify [--full]`: what became of a merged folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from support.commands import Run
from support.golden import CASES, Golden
from support.tiny_models import Pair, edit_weights, save_adapter, tiny_llama

from converters import load_adapter, merge
from converters.errors import VerificationError
from converters.outputs.checkpoint.recheck import check_against, check_hashes, plan_again


def check(run_here: Run, pair: Pair, *options: str | Path) -> tuple[int, str]:
    done = run_here("peanut-inspect", pair.output, "--verify", *options)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()


def full(pair: Pair) -> list[str | Path]:
    return ["--full", "--base", pair.base, "--adapter", pair.adapter]


def change(pair: Pair, name: str, amount: float, hide: bool) -> None:
    """Change one number of a tensor; with `hide`, the manifest too."""

    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] += amount

    edit_weights(pair.output / "model.safetensors", edit)
    if hide:
        path = pair.output / "peanut_manifest.json"
        manifest = json.loads(path.read_text())
        data = load_file(pair.output / "model.safetensors")[name].contiguous().view(-1).view(torch.uint8).numpy()
        manifest["tensors"][name]["xxh3_128"] = xxhash.xxh3_128(data.tobytes()).hexdigest()
        path.write_text(json.dumps(manifest))


def test_a_folder_as_it_was_written(pair: Pair, run_here: Run) -> None:
    merge(pair.base, pair.adapter, pair.output)
    assert check(run_here, pair) == (0, f"{pair.output}: all 21 tensors are as they were written")
    status, shown = check(run_here, pair, *full(pair))
    numbers = 2 * (32 * 32 + 16 * 32)
    assert (status, f"all {numbers} numbers of updated weights recomputed in float64" in shown) == (0, True)
    facts = json.loads(run_here("peanut-inspect", pair.output, "--verify", *full(pair), "--json").stdout)
    assert facts["recomputed"]["recomputed"] == numbers
    assert 0.4 < facts["recomputed"]["max_ulp"] <= 0.501


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_changed_number(pair: Pair, run_here: Run, name: str) -> None:
    merge(pair.base, pair.adapter, pair.output)
    change(pair, name, 1e-3, hide=False)
    status, said = check(run_here, pair)
    assert status == 1
    assert f"{name} changed since it was merged (model.safetensors); merge again" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "1 of 1024 recomputed numbers are wrong"),
        ("model.norm.weight", "model.norm.weight is not model.norm.weight of the base"),
        ("lm_head.weight", "lm_head.weight is not the adapter's lm_head.weight"),
    ],
)
def test_a_changed_number_that_the_manifest_hides(
    make_pair: Callable[..., Pair], run_here: Run, name: str, message: str
) -> None:
    """The one that the sample of the merge's own verification would miss, too: the last."""
    pair = make_pair(modules_to_save=["lm_head"])
    merge(pair.base, pair.adapter, pair.output, dtype="bf16")
    change(pair, name, 0.01, hide=True)
    assert check(run_here, pair)[0] == 0
    status, said = check(run_here, pair, *full(pair))
    assert (status, message in said) == (1, True), said


def test_other_inputs_than_it_was_merged_from(pair: Pair, run_here: Run) -> None:
    merge(pair.base, pair.adapter, pair.output)
    other = replace(pair, base=pair.base.with_name("other"), adapter=pair.base.with_name("another"))
    tiny_llama().save_pretrained(other.base)
    save_adapter(tiny_llama(), other.adapter, 9)
    status, said = check(run_here, pair, *full(replace(pair, base=other.base)))
    assert (status, "was merged from a base with fingerprint sampled-sha256:" in said) == (1, True)
    status, said = check(run_here, pair, *full(replace(pair, adapter=other.adapter)))
    assert (status, "was merged with adapters of digest 1 times" in said) == (1, True)
    status, said = check(run_here, pair, *full(pair)[:-1], f"{pair.adapter}=0.5")
    assert (status, "given are 0.5 times" in said) == (1, True)


def test_what_is_no_merged_folder(pair: Pair, run_here: Run) -> None:
    status, said = check(run_here, replace(pair, output=pair.base))
    assert (status, "no peanut_manifest.json; expected a folder that peanut-merge wrote" in said) == (1, True)
    merge(pair.base, pair.adapter, pair.output)
    assert "--full needs --verify, --base and --adapter" in check(run_here, pair, "--full")[1]
    edit_weights(pair.output / "model.safetensors", lambda weights: weights.pop("model.norm.weight"))
    assert "model.norm.weight is missing" in check(run_here, pair)[1]


@pytest.mark.parametrize("case", [c for c in CASES if c.file == "theta.safetensors"][:12:3], ids=lambda c: c.name)
def test_every_layout(case: Golden, tmp_path: Path, run_here: Run) -> None:
    options = [f"--{name}={value}" for name, value in case.options.items()]
    merged = run_here("peanut-merge", "--base", case.base, "--adapter", case.adapter, "-o", tmp_path / "m", *options)
    assert merged.returncode == 0, merged.stderr
    done = run_here("peanut-inspect", tmp_path / "m", "--verify", "--full", "--base", case.base, "--adapter",
                    case.adapter, *options)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kinds", [["rows"], ["rows", "columns"], ["columns", "columns"]])
def test_rows_columns_and_sums_in_parts(
    make_pair: Callable[..., Pair], kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are small enough that each weight takes several; a number in the last one is wrong."""
    monkeypatch.setattr("converters.outputs.checkpoint.recheck._NUMBERS", 300)
    pair = make_pair(target_modules=["q_proj"], act_fn="tanh")
    opened = load_adapter(pair.adapter)
    adapters = [
        replace(
            opened,
            modules={n: replace(t, settings={**t.settings, "orientation": kind}) for n, t in opened.modules.items()},
        )
        for kind in kinds
    ]
    plan = merge(pair.base, adapters, pair.output).plan
    again = plan_again(pair.output, plan.base, plan.adapters)
    assert check_against(pair.output, again).recomputed == 2 * 32 * 32
    change(pair, "model.layers.1.self_attn.q_proj.weight", 1e-5, hide=True)
    check_hashes(pair.output)
    with pytest.raises(VerificationError, match=r"1 of \d+ recomputed numbers are wrong"):
        check_against(pair.output, again)
