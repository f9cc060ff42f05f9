"""In bfloat16, vLLM with the LoRA is as close to the float32 reference as bfloat16 allows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.engines.serving import QUESTIONS, environment
from support.paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from converters import merge

ADAPTERS = ROOT / "examples" / "adapters"

# vLLM starts processes, which would import a test module again
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from peanut_serve import LoraRequests
    base, adapters, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    tasks = LoraRequests(base, adapters, dtype="bf16")
    llm = LLM(base, dtype="bfloat16", max_model_len=256, enable_lora=True, max_loras=3, max_lora_rank=32,
              lora_target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    found = llm.generate([{"prompt_token_ids": tokens} for _, tokens in texts],
                         SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
                         lora_request=[tasks.get(task) for task, _ in texts], use_tqdm=False)
    logprobs = [[step[token].logprob for step, token in list(zip(one.prompt_logprobs, tokens))[1:]]
                for one, (_, tokens) in zip(found, texts)]
    print("LOGPROBS", json.dumps(logprobs))
"""


def logprobs(model: PreTrainedModel | PeftModel, tokens: list[int]) -> torch.Tensor:
    """The logprob of every token but the first, given the previous ones."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


@pytest.mark.vllm
def test_the_error_is_that_of_bfloat16(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts, truth, noise = [], [], []
    for adapter in sorted(ADAPTERS.iterdir()):
        merged = merge(smollm2, adapter, tmp_path / adapter.name, dtype="fp32").output
        exact = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        short = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        peft = PeftModel.from_pretrained(base, adapter)
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is 9, in Rome."}]
            tokens = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            texts.append((adapter.name, tokens))
            truth.append(logprobs(exact, tokens))
            noise += [(logprobs(model, tokens) - truth[-1]).abs() for model in (short, peft)]
    script = tmp_path / "score.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, smollm2, ADAPTERS, json.dumps(texts)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGPROBS ")]
    assert lines, done.stderr[-2000:]
    found = [torch.tensor(one) for one in json.loads(lines[0].removeprefix("LOGPROBS "))]
    ours = torch.cat([(one - wanted).abs() for one, wanted in zip(found, truth, strict=True)])
    theirs = torch.cat(noise)
    assert ours.mean() <= 1.5 * theirs.mean(), (float(ours.mean()), float(theirs.mean()))
    assert ours.max() <= 2 * theirs.max(), (float(ours.max()), float(theirs.max()))
    print(f"mean {ours.mean():.4f}, in transformers {theirs.mean():.4f}")
