"""`--format lora --rank`: truncated SVDs beside those of NumPy, PEFT's forward pass of the result, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import HiraConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig
from safetensors.torch import load_file
from support.commands import Run
from support.peft_methods import MODELS, logits, reloaded, train
from support.tiny_models import Pair, edit_weights, tiny_llama

from converters import Weighted, load_adapter, prepare_merge
from converters.errors import ConversionError, NonFiniteError, OptionError, VerificationError
from converters.evaluation.truncation import Truncation
from converters.outputs.lora import LoraCheck, LoraOptions, plan_lora_adapter, write_lora_adapter

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def config_of(method: type[PeftConfig], model: str = "llama", **settings: object) -> PeftConfig:
    named = {"target_modules": TARGETS[model], "task_type": "CAUSAL_LM", "fan_in_fan_out": model == "gpt2"}
    return method(**{key: value for key, value in named.items() if value is not False}, **settings)


def trained(tmp_path: Path, config: PeftConfig, model: str = "llama") -> tuple[Path, Path]:
    train(MODELS[model](), config, tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def convert(base: Path, adapters: object, output: Path, dtype: str = "auto", **options: object) -> LoraCheck:
    planned = plan_lora_adapter(prepare_merge(base, adapters, dtype=dtype), output, options=LoraOptions(**options))
    return write_lora_adapter(planned, device="cpu")


def true_deltas(base: Path, adapters: list[tuple[Path, float]]) -> dict[str, np.ndarray]:
    """Module -> the sum of the deltas by their definition, (out, in), in float64."""
    weights, found = load_file(base / "model.safetensors"), {}
    for folder, weight in adapters:
        opened = load_adapter(folder)
        for module, theta in opened.modules.items():
            w0 = weights[f"{module}.weight"].double()
            delta = opened.method(module).to("cpu", torch.float64).delta(w0.T if theta.fan_in_fan_out else w0)
            found[module] = found.get(module, 0) + weight * delta.numpy()
    return found


def svd_error(delta: np.ndarray, rank: int) -> float:
    values = np.linalg.svd(delta, compute_uv=False)
    return float(np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum()))


def written_deltas(folder: Path) -> dict[str, np.ndarray]:
    state = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(next(folder.glob("*.safetensors"))).items()
    }
    modules = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {m: (state[f"{m}.lora_B.weight"] @ state[f"{m}.lora_A.weight"]).numpy() for m in modules}


CASES = {
    "without factors": (OFTConfig, {"oft_block_size": 8}, "llama"),
    "of whole columns": (IA3Config, {"feedforward_modules": ["down_proj"]}, "llama"),
    "of a larger rank": (LoraConfig, {"r": 12}, "llama"),
    "stored transposed": (LoraConfig, {"r": 12}, "gpt2"),
    "stored transposed, without factors": (HiraConfig, {"r": 4}, "gpt2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_errors_are_those_of_numpy(case: str, dtype: str, tmp_path: Path) -> None:
    """Module by module and over all, in the result, the manifest, and the file."""
    method, settings, model = CASES[case]
    base, adapter = trained(tmp_path, config_of(method, model, **settings), model)
    check = convert(base, adapter, tmp_path / "lora", dtype, rank=6, max_error=0.95)
    deltas, files = true_deltas(base, [(adapter, 1.0)]), written_deltas(tmp_path / "lora")
    wanted = {module: svd_error(delta, 6) for module, delta in deltas.items()}
    assert min(wanted.values()) > 0.01
    assert check.approximation is not None
    assert check.approximation.modules == pytest.approx(wanted, rel=1e-9)
    norms = {module: np.linalg.norm(delta) for module, delta in deltas.items()}
    over_all = np.sqrt(sum((wanted[m] * norms[m]) ** 2 for m in wanted) / sum(n**2 for n in norms.values()))
    assert check.approximation.error == pytest.approx(over_all, rel=1e-9)
    in_file = {m: np.linalg.norm(deltas[m] - files[m]) / norms[m] for m in deltas}
    assert in_file == pytest.approx(wanted, rel=1e-5 if dtype == "auto" else 1e-2)
    assert check.approximation.found == pytest.approx(max(in_file.values()), rel=1e-9)
    assert check.recomputed == sum(delta.size for delta in deltas.values())
    manifest = json.loads((tmp_path / "lora" / "peanut_manifest.json").read_text())
    assert manifest["approximation"] == {
        "rank": 6, "max_error": 0.95, "error": check.approximation.error, "modules": dict(check.approximation.modules)
    }  # fmt: skip


@pytest.mark.parametrize("rank", [24, 31])
def test_peft_computes_nearly_what_the_adapter_does(rank: int, tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    wanted, plain = (logits(reloaded(tiny_llama(), base, adapter)), logits(type(tiny_llama()).from_pretrained(base)))
    check = convert(base, adapter, tmp_path / "lora", rank=rank, max_error=0.9)
    found = logits(reloaded(tiny_llama(), base, tmp_path / "lora"))
    assert check.approximation is not None
    change = (wanted - plain).norm()
    assert change > 0.1 * plain.norm()
    assert 0 < (found - wanted).norm() <= 3 * max(check.approximation.modules.values()) * change


def test_exact_factors_are_kept(tmp_path: Path) -> None:
    """At the rank of every module, nothing is approximated: the files are those without a rank."""
    base, adapter = trained(tmp_path, config_of(LoraConfig, r=4, rank_pattern={"v_proj": 6}))
    exact = convert(base, adapter, tmp_path / "exact")
    check = convert(base, adapter, tmp_path / "ranked", rank=6)
    assert exact.approximation is None
    assert check.approximation is not None
    assert (set(check.approximation.modules.values()), check.approximation.error) == ({0.0}, 0.0)
    assert check.recomputed == exact.recomputed
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "exact" / name).read_bytes() == (tmp_path / "ranked" / name).read_bytes()
    check = convert(base, adapter, tmp_path / "fewer", rank=4, max_error=0.9)
    assert check.approximation is not None
    by_kind = {(module.rsplit(".", 1)[-1], error == 0) for module, error in check.approximation.modules.items()}
    assert by_kind == {("q_proj", True), ("down_proj", True), ("v_proj", False)}
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "fewer"))
    assert all(torch.equal(one[key], other[key]) for key in one if "v_proj" not in key)


def test_no_weight_has_a_rank_above_its_smaller_side(tmp_path: Path) -> None:
    """v_proj is (16, 32): its delta beside a unit matrix is exact, whatever the method."""
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    check = convert(base, adapter, tmp_path / "lora", rank=16, max_error=0.9)
    assert check.approximation is not None
    errors = check.approximation.modules
    assert {module.rsplit(".", 1)[-1] for module, error in errors.items() if error == 0} == {"v_proj"}
    assert convert(base, adapter, tmp_path / "whole", rank=64, max_error=0).approximation is not None
    wanted = logits(reloaded(tiny_llama(), base, adapter))
    assert (
        logits(reloaded(tiny_llama(), base, tmp_path / "whole")) - wanted
    ).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_sum_is_truncated_as_a_sum(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    train(tiny_llama(), config_of(LoraConfig, r=3), tmp_path / "other", tmp_path / "lora3", seed=4)
    summed = [Weighted(load_adapter(adapter), 0.5), Weighted(load_adapter(tmp_path / "lora3"), -2.0)]
    check = convert(base, summed, tmp_path / "lora", rank=12, max_error=0.9)
    deltas = true_deltas(base, [(adapter, 0.5), (tmp_path / "lora3", -2.0)])
    assert check.approximation is not None
    assert check.approximation.modules == pytest.approx({m: svd_error(d, 12) for m, d in deltas.items()}, rel=1e-9)


def test_the_error_that_is_allowed(tmp_path: Path) -> None:
    """At the error itself it is written; a bit below it is refused, with the rank that would do, and does."""
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    check = convert(base, adapter, tmp_path / "lora", rank=8, max_error=0.99)
    assert check.approximation is not None
    module, largest = max(check.approximation.modules.items(), key=lambda one: one[1])
    convert(base, adapter, tmp_path / "same", rank=8, max_error=largest)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ConversionError, match=rf"^a LoRA adapter of rank 8 loses .* % of the delta of {module}"
    ) as error:
        convert(base, adapter, tmp_path / "less", rank=8, max_error=np.nextafter(largest, 0))
    assert sorted(tmp_path.iterdir()) == before
    assert "rank=9 suffices for every module" in str(error.value)
    deltas = true_deltas(base, [(adapter, 1.0)])
    for allowed in (0.3, 0.05, 1e-3):
        with pytest.raises(ConversionError, match="suffices") as error:
            convert(base, adapter, tmp_path / "less", rank=2, max_error=allowed)
        rank = int(str(error.value).split("rank=")[1].split()[0])
        assert max(svd_error(delta, rank) for delta in deltas.values()) <= allowed
        assert max(svd_error(delta, rank - 1) for delta in deltas.values()) > allowed
        convert(base, adapter, tmp_path / f"at-{allowed}", rank=rank, max_error=allowed)


def test_an_existing_output_is_kept_when_too_much_is_lost(tmp_path: Path, run_here: Run) -> None:
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    command = ["peanut-merge", "--base", base, "--adapter", adapter, "--format", "lora", "-o", tmp_path / "lora"]
    refused = run_here(*command)
    assert "cannot be expressed as LoRA; merge it, or approximate it with --rank" in refused.stderr
    done = run_here(*command, "--rank", "20", "--max-error", "0.9", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["approximation"]
    assert facts["modules"].keys() == load_adapter(adapter).modules.keys()
    kept = {file: file.read_bytes() for file in (tmp_path / "lora").iterdir()}
    refused = run_here(*command, "--rank", "2", "--overwrite")
    assert refused.returncode == 1
    assert "--max-error 0.01 allows 1 %; --rank " in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert kept == {file: file.read_bytes() for file in (tmp_path / "lora").iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert run_here("peanut-inspect", tmp_path / "lora", "--verify").returncode == 0


def test_what_is_printed(tmp_path: Path, run_here: Run) -> None:
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    command = ["peanut-merge", "--base", base, "--adapter", adapter, "--format", "lora", "-o", tmp_path / "lora"]
    done = run_here(*command, "--rank", "16", "--max-error", "0.9")
    deltas = {m: svd_error(d, 16) for m, d in true_deltas(base, [(adapter, 1.0)]).items()}
    for module, error in deltas.items():
        assert (f"    {module}: {100 * error:.3g} %" in done.stdout) == ("v_proj" not in module)
    assert "approximated: 4 of 6 modules at rank 16, the other 2 are exact; relative error " in done.stdout
    done = run_here(*command, "--rank", "96", "--overwrite")
    assert "approximated: none of 6 modules, all are exact at rank 96: error 0" in done.stdout


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_delta_that_is_next_to_nothing(scale: float, tmp_path: Path) -> None:
    """Its error is relative to the delta, not to the weight; of no delta, nothing is lost."""
    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    edit_weights(adapter / "adapter_model.safetensors", lambda state: {k: v * scale for k, v in state.items()})
    check = convert(base, adapter, tmp_path / "lora", rank=8, max_error=0.99)
    assert check.approximation is not None
    if not scale:
        assert (check.approximation.error, set(check.approximation.modules.values())) == (0.0, {0.0})
        return
    wanted = {module: svd_error(delta, 8) for module, delta in true_deltas(base, [(adapter, 1.0)]).items()}
    assert check.approximation.modules == pytest.approx(wanted, rel=1e-5)
    assert min(wanted.values()) > 0.01


def test_factors_that_do_not_fit_the_dtype(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, config_of(LoraConfig, r=12))
    edit_weights(adapter / "adapter_model.safetensors", lambda state: {k: v * 1e6 for k, v in state.items()})
    with pytest.raises(NonFiniteError, match="does not fit F16 .*write it with dtype='fp32'"):
        convert(base, adapter, tmp_path / "lora", "fp16", rank=4, max_error=0.99)
    assert not (tmp_path / "lora").exists()


def test_a_wrong_truncation_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are worse than is stated, and a statement that is worse than the factors."""
    from converters.outputs.lora import write

    base, adapter = trained(tmp_path, config_of(OFTConfig, oft_block_size=8))
    right = write.truncate
    for scale, lost in ((1.001, 1.0), (1.0, 1.001), (1.0, 0.999)):

        def wrong(delta: torch.Tensor, rank: int, scale: float = scale, lost: float = lost) -> Truncation:
            found = right(delta, rank)
            return replace(found, up=found.up * scale, lost=found.lost * lost)

        monkeypatch.setattr(write, "truncate", wrong)
        with pytest.raises(VerificationError, match=r"the factors differ from its update by .*, expected "):
            convert(base, adapter, tmp_path / "lora", rank=8, max_error=0.99)
        assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank 0 is not a rank; expected at least 1"),
        (["--rank", "4", "--max-error", "1"], "--max-error 1 is not a relative error; expected 0.01 for 1 %"),
        (["--rank", "4", "--max-error", "nan"], "is not a relative error"),
        (["--max-error", "0.1"], "--max-error needs --rank: without a rank, only exact factors are written"),
        (["--for", "tgi"], "--for tgi is unknown; expected vllm"),
    ],
)
def test_options_are_checked(options: list[str], message: str, pair: Pair, run_here: Run) -> None:
    command = ["peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output]
    done = run_here(*command, "--format", "lora", *options)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    other = run_here(*command, *options)
    assert f"{options[0]} is for --format lora, not for --format merged" in other.stderr
    assert not pair.output.exists()


def test_the_options_in_python() -> None:
    with pytest.raises(OptionError, match="rank=-1"):
        LoraOptions(rank=-1)
