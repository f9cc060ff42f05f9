"""A request by Hugging Face's protocol, from its body to the body of its answer."""

import asyncio

from peanut_serve.classify.hugging_face import ask_of, inputs_of, read_question, write_answers
from peanut_serve.classify.serving.results import Answered
from peanut_serve.classify.serving.server import TaskServer

_LARGE = 64 << 10  # bytes of a body that is read beside the loop


async def ask_task(server: TaskServer, name: str, body: bytes, content_type: str) -> tuple[Answered, bytes]:
    """What a task answers, and how that is written.

    Raises `RequestBodyError`, and what `TaskServer.predict` raises.
    """
    if len(body) > _LARGE:
        question = await asyncio.to_thread(read_question, body, content_type)
    else:
        question = read_question(body, content_type)
    count = len(question.inputs)
    found = await server.predict_with(name, count, lambda task: (inputs_of(question, task), ask_of(question, task)))
    size = sum(getattr(one, "size", len(one)) for one in found.answers)
    kind = found.version.task.kind
    return found, await server.written(lambda: write_answers(kind, question, found.answers), size)
