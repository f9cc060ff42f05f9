"""Three tasks in one batch, on one engine of vLLM.

python examples/offline_batch.py BASE ADAPTERS
"""

import sys

from vllm import LLM, SamplingParams

from peanut_serve import LoraRequests

QUESTION = "Tom has 4 apples and gets 5 more. How many apples does Tom have now?"


def main(base: str, adapters: str) -> None:
    """Ask all tasks the same at once."""
    tasks = LoraRequests(base, adapters)
    names = tasks.roots.names()
    llm = LLM(base, dtype="float32", max_model_len=512, enable_lora=True, max_loras=len(names), max_lora_rank=32)
    chats = [[{"role": "user", "content": QUESTION}] for _ in names]
    answers = llm.chat(
        chats,
        SamplingParams(temperature=0, max_tokens=24),
        lora_request=[tasks.get(name) for name in names],
        use_tqdm=False,
    )
    for name, answer in zip(names, answers, strict=True):
        print(f"{name}: {answer.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
