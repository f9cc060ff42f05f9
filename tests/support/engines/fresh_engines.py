"""Answers of engines that were started for one model each: what a swapped engine has to answer, exactly.

Greedy tokens, and the logprob of the first. Arguments: a JSON file of prompts (lists of tokens), the number of
tokens, then model folders. Each engine runs in a fork of this process, which has done no more than vLLM's imports.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the fork is its process


def main() -> None:
    from vllm import LLM, SamplingParams

    prompts, count = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0)
    for folder in sys.argv[3:]:
        if (child := os.fork()) == 0:
            engine = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True)
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            answers = [engine.generate(one, params, use_tqdm=False)[0].outputs[0] for one in inputs]
            tokens = [list(found.token_ids) for found in answers]
            first = [found.logprobs[0][found.token_ids[0]].logprob for found in answers]
            print("ANSWERS " + json.dumps({"tokens": tokens, "logprobs": first}), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
