"""Key prefixes, adapter names and folders that different ways of saving leave behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.golden import LLM, VISION
from support.tiny_models import Pair, edit_weights, tiny_llama

from converters import load_adapter, merge
from converters.adapters.source import clean_name
from converters.errors import BaseMismatchError, LayoutError, OptionError, PeanutError, ThetaError

PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", ""]


def rename(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(("key", "name"), [
    ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_A.weight"),
    ("_orig_mod.base_model.model.lm_head.weight", "lm_head.weight"),
    ("module._orig_mod.base_model.model._orig_mod.lm_head.weight", "lm_head.weight"),
    ("vit._orig_mod.encoder.weight", "vit.encoder.weight"),
    ("base_model.model.module.fc.weight", "fc.weight"),
    ("module", "module"),
    ("model.module.weight", "model.module.weight"),
])  # fmt: skip
def test_names_without_wrappers(key: str, name: str) -> None:
    assert clean_name(key) == name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("source", ["hf-peft", "authors-llm", "authors-vision"])
def test_prefixes_change_nothing(pair: Pair, tmp_path: Path, prefix: str, source: str) -> None:
    if source == "authors-vision":
        adapter = file = Path(shutil.copy(VISION / "vanilla_qv" / "theta.bin", tmp_path))
    elif source == "authors-llm":
        adapter = Path(shutil.copytree(LLM / "gqa" / "adapter", tmp_path / "gqa"))
        file = adapter / "adapter_model.bin"
    else:
        adapter, file = pair.adapter, pair.adapter / "adapter_model.safetensors"
    digest = load_adapter(adapter).digest
    if prefix:
        edit_weights(file, rename(lambda name: prefix + name))
    else:
        edit_weights(file, rename(lambda name: name.removeprefix("base_model.model.")))
    assert load_adapter(adapter).digest == digest


def test_the_same_tensor_twice(pair: Pair) -> None:
    file = pair.adapter / "adapter_model.safetensors"
    edit_weights(file, lambda w: {**w, **{f"module.{name}": t.clone() for name, t in w.items()}})
    with pytest.raises(ThetaError, match="name the same tensor"):
        load_adapter(pair.adapter)


def peanut(model: torch.nn.Module, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    config = PeanutConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, depth=1, **settings)
    return get_peft_model(model, config)


@pytest.fixture
def in_memory(tmp_path: Path) -> PeftModel:
    """An adapted model, saved by PEFT and, with the adapter's name in the keys, as its whole state dict."""
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapted = peanut(model, modules_to_save=["lm_head"])
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    adapted.save_pretrained(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    shutil.copy(tmp_path / "saved" / "adapter_config.json", tmp_path / "raw")
    torch.save(adapted.state_dict(), tmp_path / "raw" / "adapter_model.bin")
    return adapted


def test_a_whole_peft_model_is_read_and_its_base_compared(in_memory: PeftModel, tmp_path: Path) -> None:
    saved, raw = load_adapter(tmp_path / "saved"), load_adapter(tmp_path / "raw")
    assert raw.digest == saved.digest
    assert len(raw.embedded) == len(load_file(tmp_path / "base" / "model.safetensors")) - 1  # not the head
    merge(tmp_path / "base", tmp_path / "saved", tmp_path / "one")
    merge(tmp_path / "base", tmp_path / "raw", tmp_path / "two")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    edit_weights(
        tmp_path / "base" / "model.safetensors", lambda w: w["model.layers.1.mlp.up_proj.weight"].mul_(1.001)
    )
    with pytest.raises(BaseMismatchError, match=r"1 of the 20 base weights saved in .*up_proj.weight"):
        merge(tmp_path / "base", tmp_path / "raw", tmp_path / "three")


def test_only_theta_with_the_adapters_name(in_memory: PeftModel, tmp_path: Path) -> None:
    edit_weights(
        tmp_path / "raw" / "adapter_model.bin",
        lambda w: {n: t for n, t in w.items() if ".default." in n},
    )
    assert load_adapter(tmp_path / "raw").digest == load_adapter(tmp_path / "saved").digest


def test_two_adapters_in_one_file(in_memory: PeftModel, tmp_path: Path) -> None:
    in_memory.add_adapter("second", in_memory.peft_config["default"])
    torch.save(in_memory.state_dict(), tmp_path / "raw" / "adapter_model.bin")
    with pytest.raises(ThetaError, match=r"several adapters \(default, second\) in one file"):
        load_adapter(tmp_path / "raw")


def test_lora_keys_with_the_adapters_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "saved")
    (tmp_path / "raw").mkdir()
    shutil.copy(tmp_path / "saved" / "adapter_config.json", tmp_path / "raw")
    torch.save(adapted.state_dict(), tmp_path / "raw" / "adapter_model.bin")
    assert load_adapter(tmp_path / "raw").digest == load_adapter(tmp_path / "saved").digest


def test_a_trainers_checkpoint_folder(pair: Pair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair.adapter, run / "checkpoint-20")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (run / "checkpoint-20" / name).write_bytes(b"state of the trainer")
    adapter = load_adapter(run / "checkpoint-20")
    assert adapter.digest == load_adapter(pair.adapter).digest
    assert adapter.name == "checkpoint-20"
    with pytest.raises(LayoutError, match="is not an adapter itself, but contains checkpoint-20; give one of these"):
        load_adapter(run)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """What the authors' fine-tuning leaves: θ as pytorch_model.bin in checkpoints, the config in the run's folder."""
    run = Path(shutil.copytree(LLM / "gqa" / "adapter", tmp_path / "run"))
    (run / "checkpoint-200").mkdir()
    shutil.copy(run / "adapter_model.bin", run / "checkpoint-200" / "pytorch_model.bin")
    (run / "checkpoint-200" / "training_args.bin").write_bytes(b"state of the trainer")
    return run


def test_pytorch_model_bin_in_a_checkpoint_folder(old_run: Path) -> None:
    adapter = load_adapter(old_run / "checkpoint-200")
    assert adapter.evidence.startswith("adapter_config.json one folder up says peft_type LORA and has merge_weights")
    assert (adapter.layout, adapter.digest) == ("authors-llm", load_adapter(old_run).digest)


def test_a_checkpoint_folder_whose_config_is_lost(old_run: Path, tmp_path: Path) -> None:
    expected = load_adapter(old_run).digest
    lost = Path(shutil.copytree(old_run / "checkpoint-200", tmp_path / "lost"))
    with pytest.raises(OptionError, match=r"no adapter_config.json, and only that states s = lora_alpha / r"):
        load_adapter(lost)
    assert load_adapter(lost, scaling=12 / 6).digest == expected


def test_a_training_checkpoint_that_holds_the_state_dict(tmp_path: Path) -> None:
    theta = torch.load(VISION / "vanilla_qv" / "theta.bin", weights_only=True)
    torch.save({"model": theta, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "best.pt")
    assert load_adapter(tmp_path / "best.pt").digest == load_adapter(VISION / "vanilla_qv" / "theta.bin").digest


def test_several_weights_in_one_folder() -> None:
    with pytest.raises(LayoutError, match=r"weights files \(.*full_state_dict.bin, theta.bin, theta.safetensors\)"):
        load_adapter(VISION / "vanilla_qv")


def test_theta_of_peft_without_its_config(pair: Pair) -> None:
    (pair.adapter / "adapter_config.json").unlink()
    with pytest.raises(PeanutError, match=r"contains θ of HF PEFT, but there is no adapter_config.json next to it"):
        load_adapter(pair.adapter)
