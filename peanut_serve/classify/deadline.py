"""Waits that end."""

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def within(seconds: float, awaited: Awaitable[_T]) -> _T:
    """As `asyncio.wait_for`, which before Python 3.12 makes a task of everything that is awaited.

    Raises `asyncio.TimeoutError`.
    """
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(awaited, seconds)
    async with asyncio.timeout(seconds):
        return await awaited
