"""Ask a base model and a merged one the same questions, and show the answers side by side.

python examples/side_by_side.py BASE MERGED
"""

import sys

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "What is the capital of Italy?",
    "What color is grass?",
    "Tom has 4 apples and gets 5 more. How many apples does Tom have now?",
)


def answers(folder: str) -> list[str]:
    """Greedy answers of the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        found.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


if __name__ == "__main__":
    base, merged = sys.argv[1:]
    table = Table("question", "base", "merged", show_lines=True)
    for row in zip(QUESTIONS, answers(base), answers(merged), strict=True):
        table.add_row(*row)
    Console().print(table)
