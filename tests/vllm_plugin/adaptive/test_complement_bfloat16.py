"""In bfloat16, vLLM with complements on merged weights is as close to the float32 reference as bfloat16 allows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.engines.logprobs import logprobs
from support.engines.serving import QUESTIONS, environment
from support.paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import merge, open_checkpoint
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.complement import complement_export
from peanut_serve.lora.exporter import LoraExporter
from peanut_serve.variants.lora_export import LoraExport
from peanut_serve.variants.roots import AdapterRoots

ADAPTERS = ROOT / "examples" / "adapters"
RESIDENT = "smollm2-json"

# vLLM starts processes, which would import a test module again
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    merged, folders, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(merged, dtype="bfloat16", max_model_len=256, enable_lora=True, max_loras=3, max_lora_rank=64,
              enforce_eager=True, lora_target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    requests = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(folders.items(), 1)}
    found = llm.generate([{"prompt_token_ids": tokens} for _, tokens in texts],
                         SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
                         lora_request=[requests.get(task) for task, _ in texts], use_tqdm=False)
    logprobs = [[step[token].logprob for step, token in list(zip(one.prompt_logprobs, tokens))[1:]]
                for one, (_, tokens) in zip(found, texts)]
    print("LOGPROBS", json.dumps(logprobs))
"""


def complements(base: Path, folder: Path) -> dict[str, str]:
    """Name -> folder of its complement beside the resident, with factors in bfloat16; `base` is that of the base."""
    cache = LoraCache(folder / "evaluated", 10**9)
    exporter, roots = LoraExporter(str(base), cache, dtype="bf16"), AdapterRoots([ADAPTERS])

    def export(name: str) -> LoraExport:
        source = roots.find(name)
        assert source is not None
        found = exporter.export(source)
        return LoraExport(found.digest, lambda path: None)

    found = {}
    for name in ["base", *roots.names()]:
        if name != RESIDENT:
            own = None if name == "base" else export(name)
            made = complement_export(own, export(RESIDENT), "r" * 40, cache)
            found[name] = str(cache.get(made.key, made.write).folder)
    return found


@pytest.mark.vllm
def test_the_error_is_that_of_bfloat16(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folders = complements(smollm2, tmp_path)
    dtype = next(iter(open_checkpoint(smollm2).tensors.values())).dtype
    resident = merge(smollm2, ADAPTERS / RESIDENT, tmp_path / "resident", dtype="bf16").output
    texts, truth, noise = [], [], []
    for name in [RESIDENT, *folders]:
        if name == "base":
            exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
            short = [AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)]
        else:
            merged = merge(smollm2, ADAPTERS / name, tmp_path / name, dtype="fp32").output
            exact = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
            base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
            short = [AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)]
            short.append(PeftModel.from_pretrained(base, ADAPTERS / name))
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is 9, in Rome."}]
            tokens = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            texts.append((name, tokens))
            truth.append(logprobs(exact, tokens))
            noise += [(logprobs(model, tokens) - truth[-1]).abs() for model in short]
    script = tmp_path / "score.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, resident, json.dumps(folders), json.dumps(texts)],
        capture_output=True,
        text=True,
        env={**environment(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGPROBS ")]
    assert lines, done.stderr[-2000:]
    found = [torch.tensor(one) for one in json.loads(lines[0].removeprefix("LOGPROBS "))]
    ours = torch.cat([(one - wanted).abs() for one, wanted in zip(found, truth, strict=True)])
    theirs = torch.cat(noise)
    print(f"mean {ours.mean():.4f}, in transformers {theirs.mean():.4f}, base in {dtype}")
    assert ours.mean() <= 1.5 * theirs.mean(), (float(ours.mean()), float(theirs.mean()))
    assert ours.max() <= 2 * theirs.max(), (float(ours.max()), float(theirs.max()))
