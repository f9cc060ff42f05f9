"""Ask every task of a running `peanut-serve` the same, all at once.

peanut-serve --base BASE --adapters ADAPTERS
python examples/online_tasks.py http://127.0.0.1:8000
"""

import asyncio
import sys

from openai import AsyncOpenAI

QUESTION = "Tom has 4 apples and gets 5 more. How many apples does Tom have now?"


async def ask(client: AsyncOpenAI, task: str) -> str:
    """The answer of one task."""
    answer = await client.chat.completions.create(
        model=task, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    return f"{task}: {answer.choices[0].message.content}"


async def main(server: str) -> None:
    """Ask the base and every adapter."""
    client = AsyncOpenAI(base_url=f"{server}/v1", api_key="none")
    tasks = [model.id async for model in client.models.list()]
    for answer in await asyncio.gather(*(ask(client, task) for task in tasks)):
        print(answer)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
