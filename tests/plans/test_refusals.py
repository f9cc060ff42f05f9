"""Ways to be wrong, and the one line each of them gets. Nothing is written, and no traceback is shown."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import Run
from support.golden import GLUE, LLM, VISION
from support.paths import DATA
from support.tiny_models import edit_json, edit_weights
from torch import Tensor

Weights = dict[str, Tensor]
Q = "vit.encoder.layer.0.attention.attention.q_adapter"


@dataclass
class Setting:
    """What a user has: a copy of a golden case in a folder, to be spoilt."""

    folder: Path
    adapter: Path
    base: Path

    def file(self) -> Path:
        return self.adapter if self.adapter.is_file() else self.adapter / "adapter_model.bin"

    def change(self, change: Callable[[Weights], object]) -> None:
        edit_weights(self.file(), change)


def llm(folder: Path, case: str = "gqa") -> Setting:
    return Setting(folder, Path(shutil.copytree(LLM / case / "adapter", folder / "gsm8k")), LLM / case / "base")


def vision(folder: Path, case: str = "multilayer_depth6_qv", file: str = "theta.safetensors") -> Setting:
    adapter = shutil.copy(VISION / case / file, folder / f"pets{Path(file).suffix}")
    return Setting(folder, Path(adapter), VISION / case / "base")


def glue(folder: Path) -> Setting:
    case = GLUE / "peanut_l_scale0.1"
    return Setting(folder, Path(shutil.copy(case / "theta.safetensors", folder / "mrpc.safetensors")), case / "base")


def only_square(setting: Setting) -> None:
    setting.change(lambda w: {n: t for n, t in w.items() if "q_proj" in n})
    edit_json(setting.adapter / "adapter_config.json", target_modules=["q_proj"])


def swap(weights: Weights) -> Weights:
    """A under B's name and B under A's."""
    turned = {"lora_A": "lora_B", "lora_B": "lora_A", ".A.": ".B.", ".B.": ".A."}
    return {next((n.replace(old, new) for old, new in turned.items() if old in n), n): t for n, t in weights.items()}


def bomb(setting: Setting, marker: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    setting.file().write_bytes(pickle.dumps({"x": Bomb()}))


def without(part: str) -> Callable[[Setting], None]:
    """Leave out the tensors with `part` in their names."""
    return lambda setting: setting.change(lambda w: {n: t for n, t in w.items() if part not in n})


def narrow(weights: Weights) -> Weights:
    """θ as of a model of 40 channels."""
    cut = {name: t[:, :40] if ".A." in name else t[:40] for name, t in weights.items() if "adapter" in name}
    return {**weights, **{name: t.contiguous() for name, t in cut.items()}}


def whole(folder: Path) -> Setting:
    return vision(folder, file="full_state_dict.bin")


def peft(folder: Path) -> Setting:
    adapter = Path(shutil.copytree(DATA / "vit-tiny" / "oddeven", folder / "oddeven"))
    return Setting(folder, adapter, DATA / "vit-tiny" / "base")


def other_base(setting: Setting) -> None:
    setting.base = VISION / "vanilla_qv" / "base"


# case -> (what the user has, how it is spoilt, options, what the line says)
Row = tuple[Callable[[Path], Setting], Callable[[Setting], object] | None, list[str], str]
TABLE: dict[str, Row] = {
    # wrong layout flag
    "layout: PEFT's folder as LoRA": (
        peft, None, ["--layout", "lora"],
        "is not in the layout lora (LoRA and DoRA as PEFT writes them: peft_type LORA, lora_A (r, in) and lora_B "
        "(out, r)): it is hf-peft, because adapter_config.json says peft_type PEANUT",
    ),
    "layout: the LLM code's folder as vision": (
        llm, None, ["--layout", "authors-vision"], "is not in the layout authors-vision",
    ),
    "layout: a GLUE file as vision": (
        glue, None, ["--layout", "authors-vision"], "it is authors-glue, because mrpc.safetensors has keys like",
    ),
    "layout: the LLM code's folder as LoRA": (
        llm, None, ["--layout", "lora"],
        "the weight has shape (48, 80), θ was trained for out = 80 x in = 80 (r = 6); this is another base",
    ),
    "layout: of another name": (
        llm, None, ["--layout", "dora"], "layout 'dora' is unknown; known are hf-peft, authors-llm",
    ),
    # missing or superfluous scaling
    "scaling: missing for GLUE": (glue, None, [], "does not save the scale s: give --scaling"),
    "scaling: no number": (glue, None, ["--scaling", "nan"], "--scaling nan: expected a finite number"),
    "scaling: stated by PEFT": (peft, None, ["--scaling", "2"], "states the scaling (1.0); leave it out"),
    "scaling: stated by the LLM code": (llm, None, ["--scaling", "2"], "states lora_alpha and r; leave it out"),
    "scaling: config lost": (
        llm, lambda s: (s.adapter / "adapter_config.json").unlink(), [], "only that states s = lora_alpha / r",
    ),
    # ambiguity
    "square": (
        llm, only_square, [],
        "every adapted weight is square, so nothing shows whether this is a plain LoRA or from the PEANuT authors' "
        "LLM code, which saves under the same names; say --layout authors-llm or --layout lora",
    ),
    # wrong base
    "base: same shapes, whole state dict": (whole, other_base, [], "this is not the base it was trained on"),
    "base: more layers": (
        vision, lambda s: setattr(s, "base", DATA / "vit-tiny" / "base"), [],
        "should have θ like the rest, but the weights contain none for it; the adapter is incomplete, or belongs to "
        "another base",
    ),
    "base: another width": (
        lambda f: vision(f, "vanilla_qv"), lambda s: s.change(narrow), [],
        "the weight has shape (48, 48), θ was trained for out = 40 (r = 7); this is another base, or another model",
    ),
    "base: another architecture": (
        vision, lambda s: setattr(s, "base", LLM / "gqa" / "base"), [],
        "has no AutoModelForImageClassification for the model type llama; is this the base it was trained on?",
    ),
    "base: self without weights": (
        vision, lambda s: setattr(s, "base", Path("self")), [], "contains θ only and no base weights; give the base",
    ),
    # swapped A and B
    "swapped: LLM code": (
        llm, lambda s: s.change(swap), [],
        "down_proj: lora_A has 80 rows, the config says r = 6; they disagree, or A and B are swapped",
    ),
    "swapped: LLM code without a config": (
        llm, lambda s: (s.change(swap), (s.adapter / "adapter_config.json").unlink()),
        ["--scaling", "2", "--layout", "authors-llm"],
        "the weight has shape (48, 80), θ was trained for in = 6 (r = 80); A and B look swapped",
    ),
    "swapped: vision code": (
        lambda f: vision(f, "vanilla_qv"), lambda s: s.change(swap), [],
        "the weight has shape (48, 48), θ was trained for out = 7 (r = 48); A and B look swapped",
    ),
    "swapped: vision code with hidden layers": (
        vision, lambda s: s.change(swap), [],
        "query: a hidden layer has shape (7, 7); expected (48, 48); A and B look swapped",
    ),
    # hidden layers
    "depth: a decoder is missing": (
        vision, without(f"{Q}.decoders.1.weight"), [],
        "layer.0.attention.attention.query: 2 encoders but 1 decoders; mirrored residuals need as many",
    ),
    "depth: an encoder in the middle is missing": (
        vision, without(f"{Q}.encoders.0.weight"), [],
        "encoders [1] are not numbered from 0 without a gap; one is missing",
    ),
    "depth: naive, one of four": (
        lambda f: vision(f, "naive_depth6_qv"), without(f"{Q}.i3.weight"), [], "query: i3 of i1 to i4 is missing",
    ),
    "depth: another width": (
        vision, lambda s: s.change(lambda w: w.update({f"{Q}.encoders.0.weight": torch.zeros(3, 3)})), [],
        "query: a hidden layer has shape (3, 3); expected (7, 7)",
    ),
    # incomplete
    "layer missing: vision": (vision, without("layer.1"), [], "layers.1.attention.q_proj and 1 more should have θ"),
    "layer missing: LLM code": (
        llm, without("layers.1.mlp"), [], "model.layers.1.mlp.down_proj and 1 more should have θ like the rest",
    ),
    "q without v": (
        vision, without("layer.0.attention.attention.v_"), [],
        "query has θ, vit.encoder.layer.0.attention.attention.value has none; the authors' code adapts both",
    ),
    "one of the dense layers": (
        lambda f: vision(f, "vanilla_qvmlp"), without("output.dense.adapter"), [],
        "only intermediate.dense of the dense layers has θ",
    ),
    "B missing: vision": (vision, without(f"{Q}.B.weight"), [], "query: B is missing; the adapter is incomplete"),
    "B missing: LLM code": (llm, without("layers.0.self_attn.q_proj.lora_B"), [], "q_proj: lora_B is missing"),
    "not finite": (
        vision, lambda s: s.change(lambda w: w[f"{Q}.A.weight"].view(-1)[:2].fill_(float("nan"))), [],
        "A.weight contains 2 NaN or Inf values out of 336; the training diverged",
    ),
    # dangerous or damaged
    "a pickle that runs code": (
        llm, lambda s: bomb(s, s.folder / "exploded"), [],
        "contains more than tensors and was not opened, because it could run code; save the adapter as safetensors",
    ),
    "truncated safetensors": (
        vision, lambda s: s.adapter.write_bytes(s.adapter.read_bytes()[:-9]), [], "not a whole safetensors file",
    ),
    "truncated pickle": (
        llm, lambda s: s.file().write_bytes(s.file().read_bytes()[:5000]), [], "not a complete torch file",
    ),
    "not a state dict": (
        llm, lambda s: torch.save([1, 2], s.file()), [], "contains a list; expected a state dict of tensors",
    ),
    # something else
    "a model without θ": (
        vision, lambda s: setattr(s, "adapter", s.base), [], "is a model without θ; expected an adapter",
    ),
    "weights of something else": (
        vision, lambda s: save_file({"unet.mid.weight": torch.zeros(2)}, s.adapter), [],
        "merge it with diffusers (load_lora_weights, then fuse_lora) (its keys: unet.mid.weight, ...)",
    ),
    "labels of another head": (
        vision, None, ["--labels", "labels.json"], "2 labels were given, the adapter's head has 5 outputs",
    ),
    "a weight that is no number": (
        vision, None, ["--adapter", "other=x"], "'x' is not a valid weight; expected a finite number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_each_gets_its_line(case: str, tmp_path: Path, run_here: Run) -> None:
    make, spoil, options, line = TABLE[case]
    setting = make(tmp_path)
    if spoil is not None:
        spoil(setting)
    if "labels.json" in options:
        (tmp_path / "labels.json").write_text('["a", "b"]')
        options = ["--labels", str(tmp_path / "labels.json")]
    before = sorted(tmp_path.rglob("*"))
    named = ["--base", setting.base, "--adapter", setting.adapter, "-o", tmp_path / "merged"]
    done = run_here("peanut-merge", *named, *options)
    assert done.returncode == 1
    assert line in done.stderr
    assert done.stderr.startswith("peanut-merge: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "options"), [(llm, []), (vision, []), (whole, []), (peft, []), (glue, ["--scaling", "0.1"])]
)
def test_the_settings_are_right_before_they_are_spoilt(
    make: Callable[[Path], Setting], options: list[str], tmp_path: Path, run_here: Run
) -> None:
    """Else a row of the table could be refused for another reason."""
    setting = make(tmp_path)
    named = ["--base", setting.base, "--adapter", setting.adapter, "-o", tmp_path / "merged"]
    done = run_here("peanut-merge", *named, *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()
