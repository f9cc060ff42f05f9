"""Every command and snippet of the README runs, on tiny models under the README's names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import Run, run
from support.golden import GLUE, VISION
from support.hub.server import hub_settings, serve_hub
from support.paths import JSON_ADAPTER, ROOT
from support.server.admin import KEY, FakeControl, serving_app
from support.tiny_models import Pair, save_adapter, tiny_llama
from transformers import ViTForImageClassification

import converters
from peanut_serve.web.admin import admin_app

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
ALL_COMMANDS = [found for found in re.findall(r"`(peanut-[^`]+)`", README) if " " in found]
HUB_COMMANDS = [command for command in ALL_COMMANDS if "--stream" in command or "--push-to-hub" in command]
CTL_COMMANDS = [command for command in ALL_COMMANDS if command.startswith("peanut-serve ctl ")]
PREDICT = "peanut-serve predict "
SERVE_COMMANDS = [
    c for c in ALL_COMMANDS if c.startswith("peanut-serve ") and c not in CTL_COMMANDS and not c.startswith(PREDICT)
]
COMMANDS = [c for c in ALL_COMMANDS if c not in (*HUB_COMMANDS, *SERVE_COMMANDS, *CTL_COMMANDS)]


def save_lora_named(folder: Path, shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """A folder with LoRA's names: module -> shapes of lora_A and lora_B, in both layers of the tiny Llama."""
    folder.mkdir()
    targets = [name.rsplit(".", 1)[-1] for name in shapes]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {
        f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight": torch.randn(shape) / 9
        for i in range(2)
        for name, pair in shapes.items()
        for part, shape in zip("AB", pair, strict=True)
    }
    torch.save(state, folder / "adapter_model.bin")


def language_folders(folder: Path) -> None:
    """Adapters of a language model, of every training code."""
    attention = "self_attn"
    save_adapter(tiny_llama(), folder / "style", seed=2, act_fn="tanh")
    rows = ((2, 32), (32, 2))
    save_lora_named(folder / "math14k", {f"{attention}.q_proj": rows, f"{attention}.k_proj": rows})
    (folder / "math14k" / "checkpoint-200").mkdir()
    shutil.copy(folder / "math14k" / "adapter_model.bin", folder / "math14k" / "checkpoint-200" / "pytorch_model.bin")
    save_lora_named(folder / "qkv", {f"{attention}.q_proj": rows})
    save_lora_named(folder / "alpaca", {f"{attention}.k_proj": ((2, 32), (16, 2))})
    save_lora_named(folder / "ablation", {f"{attention}.k_proj": ((2, 32), (16, 2))})
    sine = converters.Tweaker(converters.Orientation.ROWS, torch.randn(2, 32), torch.randn(32, 2), act_fn="sin_2pi")
    converters.save_adapter(folder / "sine", {f"model.layers.0.{attention}.q_proj": sine})


def state_dicts(folder: Path) -> None:
    """Files of the authors' vision and GLUE code, on the tiny models under the README's names."""
    vit = VISION / "vanilla_qv"
    shutil.copytree(vit / "base", folder / "vit-base", dirs_exist_ok=True)
    shutil.copy(vit / "theta.bin", folder / "flowers.bin")
    shutil.copy(vit / "full_state_dict.bin", folder / "cars.bin")
    (folder / "food").mkdir()
    shutil.copy(vit / "full_state_dict.bin", folder / "food" / "pytorch_model.bin")
    shutil.copy(vit / "base" / "config.json", folder / "food")
    shutil.copytree(GLUE / "peanut_l_scale0.1" / "base", folder / "roberta-base")
    shutil.copy(GLUE / "peanut_l_scale0.1" / "theta.safetensors", folder / "mrpc.safetensors")
    theta = load_file(folder / "mrpc.safetensors")
    torch.save(theta, folder / "mrpc.bin")
    model = ViTForImageClassification.from_pretrained(folder / "vit-base", num_labels=5)
    save_adapter(model, folder / "pets", modules_to_save=["classifier"])
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "vit-base" / "preprocessor_config.json").write_text(json.dumps(processor))
    for label in ("beagle", "pug"):
        (folder / "pets-test" / label).mkdir(parents=True)
        Image.effect_noise((20, 24), 90).save(folder / "pets-test" / label / "1.png")
    shutil.copy(folder / "pets-test" / "beagle" / "1.png", folder / "beagle.png")


@pytest.fixture
def folders(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folders the README speaks of."""
    pair.base.rename(tmp_path / "llama2-7b")
    pair.adapter.rename(tmp_path / "gsm8k")
    language_folders(tmp_path)
    state_dicts(tmp_path)
    (tmp_path / "labels.json").write_text('["abyssinian", "beagle", "sphynx", "siamese", "pug"]')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(folders: Path, run_here: Run) -> None:
    assert len(COMMANDS) >= 27
    for command in COMMANDS:
        done = run_here(*shlex.split(command))
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (folders / "llama2-7b-gsm8k" / "config.json").exists()
    assert (folders / "vit-base-pets" / "config.json").exists()
    assert (folders / "small" / "config.json").exists()
    assert not (folders / "planned").exists()
    for output in ("math14k", "qkv", "checkpoint-200", "alpaca", "ablation", "sine", "gsm8k-style"):
        assert (folders / f"llama2-7b-{output}" / "config.json").exists()
    for output in ("vit-base-flowers", "vit-base-cars", "food-merged", "roberta-base-mrpc"):
        assert (folders / output / "config.json").exists()
    assert (folders / "flowers-peft" / "adapter_config.json").exists()
    assert (folders / "gsm8k-lora" / "adapter_config.json").exists()
    assert (folders / "gsm8k.png").exists()
    assert (folders / "pets-onnx" / "model.onnx").exists()
    assert (folders / "pets-int8" / "model_quantized.onnx").exists()
    assert (folders / "pets-web" / "onnx" / "model.onnx").exists()
    assert (folders / "tasks-onnx" / "flowers.onnx_adapter").exists()


def test_the_commands_that_need_a_hub(folders: Path, pair: Pair) -> None:
    with serve_hub({"meta-llama/Llama-2-7b-hf": folders / "llama2-7b"}) as hub:
        hub.uploads.writers["hf_mine"] = {"me"}
        for command in HUB_COMMANDS:
            done = run(*shlex.split(command), **hub_settings(hub, pair), HF_TOKEN="hf_mine")
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert hub.uploads.repositories["me/llama2-gsm8k"].private
    assert (folders / "streamed" / "config.json").exists()


def test_the_commands_that_serve(folders: Path, run_here: Run) -> None:
    """What they tell vLLM; test_serving.py starts one."""
    shutil.copytree(folders / "gsm8k", folders / "tasks" / "gsm8k")
    for command in SERVE_COMMANDS:
        done = run_here(*shlex.split(command), "--dry-run")
        assert "variants: gsm8k" in done.stdout, done.stderr
        assert "vllm serve llama2-7b --host 127.0.0.1" in done.stdout
        assert ("--worker-extension-cls" in done.stdout) == ("--mode" in command)
        assert ("--enable-lora" in done.stdout) == ("merged" not in command)


def test_the_commands_that_control(monkeypatch: pytest.MonkeyPatch, run_here: Run) -> None:
    """Beside an admin API; test_swapping.py has the one of a server with an engine."""
    monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)
    with serving_app(admin_app(FakeControl(), KEY)) as url:
        monkeypatch.setenv("PEANUT_ADMIN_URL", url)
        for command in CTL_COMMANDS:
            done = run_here(*shlex.split(command))
            assert done.returncode == 0, done.stderr


def test_the_server_in_the_text(smollm2: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the block for merged variants tells vLLM; test_swapping.py starts such a server."""
    monkeypatch.chdir(ROOT)
    command = next(text for kind, text in BLOCKS if kind == "sh" and "--mode merged" in text)
    done = run_here(*shlex.split(command), "--dry-run")
    assert "variants: smollm2-json, smollm2-math, smollm2-upper" in done.stdout, done.stderr


def test_every_layout_stands_in_the_table() -> None:
    from converters.adapters.layouts.names import LAYOUT_SUMMARIES

    table = README.split("## What does your folder hold?")[1].split("`peanut-inspect` says")[0]
    told = {"hf-peft": "peft_type: PEANUT", "authors-vision": "authors' vision code", "authors-glue": "GLUE code"}
    told |= {"peanut": "peanut_config.json", "lora": "PEFT's LoRA"}
    for layout in LAYOUT_SUMMARIES:
        assert told.get(layout, layout) in table


def test_the_snippets(folders: Path) -> None:
    snippets = [text for language, text in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folders / "merged" / "config.json").exists()


def test_the_make_targets_exist() -> None:
    """`make demo` and `make test` are run whole by .ci/run."""
    targets = [line.split() for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert targets == [["make", "demo"], ["make", "test"]]
    ci = (ROOT / ".ci" / "run").read_text()
    for _, target in targets:
        assert f"make {target}" in ci
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, env={**os.environ, "MAKEFLAGS": ""}
        )
        assert done.returncode == 0


def test_the_demo_shows_what_the_readme_says(smollm2: Path, tmp_path: Path) -> None:
    assert (
        run("peanut-merge", "--base", smollm2, "--adapter", JSON_ADAPTER, "-o", tmp_path / "merged").returncode == 0
    )
    script = ROOT / "examples" / "side_by_side.py"
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, script, smollm2, tmp_path / "merged"], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    assert '{"answer": "Rome"}' in shown.stdout
    assert '{"answer": "green"}' in shown.stdout
    assert shown.stdout.count('{"answer"') == 3  # the base answers in prose, whose words differ from CPU to CPU
