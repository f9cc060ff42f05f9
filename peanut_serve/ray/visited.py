"""What a front answers to a visitor: with what its tenant may send besides; the visit ends when the answer does."""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from peanut_serve.errors import ServingError
from peanut_serve.tenants.visits import Visit
from peanut_serve.web.clients import telling_rate


class _Visited(Response):
    """An answer of a visit, which ends with it.

    Args:
        answer: to send.
        visit: to end.
    """

    def __init__(self, answer: Response, visit: Visit) -> None:
        self.background = None  # FastAPI looks for it
        self._answer, self._visit = answer, visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, with what the tenant may send besides."""
        with self._visit:
            await self._answer(scope, receive, telling_rate(send, self._visit))


async def visited(visit: Visit, answer: Awaitable[Response], refusal: Callable[[ServingError], Response]) -> Response:
    """The answer of a visit, or what it is refused with."""
    with ExitStack() as leaving:
        leaving.enter_context(visit)
        try:
            found = await answer
        except ServingError as error:
            found = refusal(error)
        leaving.pop_all()  # what is answered has its place until the end
        return _Visited(found, visit)
