"""A mixture of experts in the real vLLM: an adapter with a module per expert computes what merging it gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.engines.serving import environment
from support.tiny_models import save_per_expert
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from converters import merge, prepare_merge
from converters.outputs.lora import LoraOptions, plan_lora_adapter, write_lora_adapter

PROMPTS = [list(range(2, 14)), list(range(40, 60)), [7, 5, 3]]

# vLLM starts processes, which would import a test module again
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(base, dtype="float32", max_model_len=64, enable_lora=True, max_lora_rank=8, max_logprobs=96,
              skip_tokenizer_init=True, enforce_eager=True)
    texts = [{"prompt_token_ids": tokens} for tokens in prompts]
    options = SamplingParams(max_tokens=1, temperature=0, logprobs=96, detokenize=False)
    for request in (None, LoRARequest("experts", 1, adapter)):
        found = llm.generate(texts, options, lora_request=request, use_tqdm=False)
        rows = [[one.outputs[0].logprobs[0][token].logprob for token in range(96)] for one in found]
        print("FOUND", json.dumps(rows))
"""


def log_probabilities(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([tokens])).logits[0, -1] for tokens in PROMPTS]
    return torch.stack(rows).float().log_softmax(-1)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_a_module_for_each_expert(tmp_path: Path) -> None:
    base, adapter, lora = tmp_path / "base", tmp_path / "adapter", tmp_path / "lora"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=96, num_experts=4, num_experts_per_tok=2, initializer_range=0.15,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    save_per_expert(base, adapter, "lora")
    merge(base, adapter, tmp_path / "merged")
    write_lora_adapter(plan_lora_adapter(prepare_merge(base, adapter), lora, options=LoraOptions(runtime="vllm")))
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, base, lora, json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == 2, done.stderr[-3000:]
    plain, adapted = (torch.tensor(json.loads(line.removeprefix("FOUND "))) for line in lines)
    assert (plain - log_probabilities(base)).abs().max() <= 2e-3
    assert (adapted - log_probabilities(tmp_path / "merged")).abs().max() <= 2e-3
    assert (adapted - plain).abs().max() > 0.05
