"""The real vLLM loads a merged checkpoint like any other model, and answers like transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import JSON_ADAPTER
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters import merge

QUESTIONS = ("What is the capital of Italy?", "What color is grass?", "Who wrote Romeo and Juliet?")

# runs in a script: vLLM starts workers, which would import a test module again
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model = LLM(sys.argv[1], dtype="float32", max_model_len=512, enforce_eager=True)
    chats = [[{"role": "user", "content": question}] for question in sys.argv[2:]]
    answers = model.chat(chats, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    print("ANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.mark.vllm
def test_vllm_answers_as_transformers(smollm2: Path, tmp_path: Path) -> None:
    merged = tmp_path / "smollm2-json"
    merge(smollm2, JSON_ADAPTER, merged, max_shard_size="100MB")
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, script, merged, *QUESTIONS], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-2000:]
    answers = json.loads(lines[0].removeprefix("ANSWERS "))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        assert answer == tokens[0, prompt["input_ids"].shape[1] :].tolist()
        assert tokenizer.decode(answer, skip_special_tokens=True).startswith('{"answer": "')
